"""The chat with a real model and service: what is said, kept and freed; the program as a user starts it."""

import asyncio
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from browsing import find, until
from rich.console import Console
from serving.live import running

from fastdllm.adapter import AdapterSettings, add_adapter, save_adapter
from fastdllm.checkpoint import load_checkpoint
from fastdllm.decoding.engine import Engine
from fastdllm.decoding.text import load
from fastdllm.demo import chat as chat_module
from fastdllm.demo.chat import ChatConfig, chat
from fastdllm.demo.conversation import Speaker
from fastdllm.demo.listening import Listener
from fastdllm.demo.terminal import TerminalChat
from fastdllm.demo.web import chat_routes
from fastdllm.serving import command as command_module
from fastdllm.serving.app import AppSettings, make_app
from fastdllm.serving.command import LOOPBACK_NAMES
from fastdllm.serving.service import Service

from .test_chat_page import ask, cards, shown

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data/tiny-adapted")
PROBLEM = "Tom has 12 pens. He buys 7 more pens. He loses 4 pens. How many pens does Tom have now?"
OTHER = "Sam has 15 shells. He buys 19 more shells. How many shells does Sam have now?"


@pytest.fixture(scope="module")
def generator():
    return load(MODEL, device="cpu")


@pytest.fixture
def listener(generator):
    model, tokenizer, decode, limit = generator.model, generator.tokenizer, generator.decode, 400
    speaker = Speaker(model, tokenizer, "diffusion", decode, limit)
    with Service(model, tokenizer, decode=decode, batch_size=2, max_tokens=limit) as service:
        yield Listener(speaker, service, max_new_tokens=120)


def app_of(listener):
    routes = chat_routes(listener.speaker, listener, name="tiny-adapted", system="")
    return make_app(listener.service, AppSettings(name="tiny-adapted", hosts=LOOPBACK_NAMES), routes)


def hear(listener, messages, settings=None):
    """Return all moments of an answer, and the answer."""
    with listener.ask(messages, settings or listener.speaker.usual) as asked:
        return list(asked), asked


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("settings", [{}, {"mode": "ar"}, {"threshold": 1.0, "reuse_k": 2}], ids=str)
def test_turns_give_what_an_engine_gives_alone_and_keep_what_was_read(generator, listener, settings):
    settings = replace(listener.speaker.usual, **settings)
    mode, decode, reuse = listener.speaker.options(settings)
    engine = Engine(generator.model, generator.tokenizer, mode=mode, decode=decode, reuse=reuse, batch_size=1)
    messages = []
    for turn, text in enumerate((PROBLEM, OTHER)):
        messages.append(user(text))
        moments, asked = hear(listener, messages, settings)
        (alone,) = engine.run([asked.answer.request])
        said = "".join(moment.text for moment in moments)
        assert said == alone.text and asked.answer.result().tokens == alone.tokens
        cost = asked.cost
        assert cost.num_tokens == alone.counted_tokens and cost.seconds > 0
        assert cost.tokens_per_forward == alone.counted_tokens / (alone.denoise_passes + alone.append_passes)
        assert (cost.cached_tokens >= 32) == (turn == 1) and cost.cached_tokens < cost.num_prompt_tokens
        messages.append({"role": "assistant", "content": said})


def test_drafts_are_seen_before_they_are_final_and_agree_with_what_comes(listener):
    moments, _ = hear(listener, [user(PROBLEM)], replace(listener.speaker.usual, threshold=1.0))
    drafts = [(number, moment.draft) for number, moment in enumerate(moments) if any(moment.draft)]
    assert drafts and any(None in draft for _, draft in drafts)
    for number, draft in drafts:  # what is unmasked stays: this model takes nothing back
        known = draft[: draft.index(None)] if None in draft else draft
        assert "".join(moment.text for moment in moments[number + 1 :]).startswith("".join(known))


def test_an_answer_that_is_left_frees_its_slot(listener):
    slow = replace(listener.speaker.usual, threshold=1.0)
    for _ in range(5):  # of two slots
        with listener.ask([user(PROBLEM)], slow) as asked:
            next(iter(asked))
        assert until(lambda asked=asked: asked.answer.is_ended) and asked.answer.is_cancelled
    assert until(lambda: listener.service.counts()["running"] == 0)
    _, asked = hear(listener, [user(PROBLEM)])
    assert asked.end == "stop"


def test_the_limits_are_said(generator, listener):
    listener.max_new_tokens = 5
    _, asked = hear(listener, [user(PROBLEM)])
    assert asked.end == "length" and asked.cost.num_tokens == 5
    out = io.StringIO()
    lines = iter([PROBLEM, PROBLEM * 9, PROBLEM * 15, "/quit"])
    listener.max_new_tokens = 500
    TerminalChat(
        listener.speaker, listener, listener.speaker.usual, console=Console(file=out), read=lambda _: next(lines)
    ).run()
    assert "error: the conversation has" in out.getvalue() and "begin a new one (/new)" in out.getvalue()


def test_the_mask_token_in_a_question_is_refused_and_the_chat_goes_on(listener):
    with pytest.raises(ValueError, match="the prompt holds the mask token"):
        listener.ask([user("what is |<MASK>| ?")], listener.speaker.usual)


def test_many_users_at_once_get_their_own_answers_on_the_page_s_routes(generator, listener):
    app = app_of(listener)
    numbers = range(3, 15)

    def question(number):
        return PROBLEM.replace("12", str(number))

    async def talk(client, number):
        answer = await client.post("/chat", json={"messages": [user(question(number))]})
        lines = [json.loads(line) for line in answer.text.splitlines()]
        return "".join(line.get("text", "") for line in lines), lines[-1]

    async def everyone():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await asyncio.gather(*(talk(client, number) for number in numbers))

    answers = asyncio.run(everyone())
    for number, (text, last) in zip(numbers, answers, strict=True):
        assert text == generator.generate(question(number), max_new_tokens=120)
        assert last["end"] == "stop" and last["cost"]["num_tokens"] > 10


@pytest.mark.parametrize("web", [False, True])
def test_every_option_reaches_the_conversation(monkeypatch, web):
    seen = {}

    def look(config, listener, *door):
        service = listener.service
        seen.update(new=listener.max_new_tokens, seed=listener.seed, tokens=service.max_tokens, size=service.batch_size)
        seen.update(temperature=service.decode.temperature, top_p=service.decode.top_p)
        settings = listener.speaker.usual
        mode, decode, _ = listener.speaker.options(settings)
        seen.update(mode=mode, drawn=(decode.temperature, decode.top_p), threshold=settings.threshold)

    for name in ("_talk", "serve_page"):
        monkeypatch.setattr(chat_module, name, look)
    options = dict(temperature=0.7, top_p=0.5, seed=3, max_new_tokens=9, max_tokens=99, threshold=0.6)
    options |= dict(web=True, port=0, batch_size=2) if web else {}
    chat(ChatConfig(checkpoint=MODEL, device="cpu", **options))
    expected = dict(new=9, seed=3, tokens=99, size=2 if web else 1, temperature=0.7, top_p=0.5)
    assert seen == expected | dict(mode="diffusion", drawn=(0.7, 0.5), threshold=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "seed does nothing at temperature 0, got 3; set temperature."),
        ({"top_p": 0.5}, "top_p does nothing at temperature 0, got 0.5"),
        ({"port": 9000}, "port does nothing in the terminal, got 9000; add --web."),
        ({"batch_size": 2}, "batch_size does nothing in the terminal"),
        ({"max_tokens": 2000}, "max_tokens must be at most 1024, the positions of this model, got 2000"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"port": 70000, "web": True}, "port must be 0 to 65535, got 70000"),
        ({"mode": "ar", "threshold": 0.5}, "threshold has no effect in mode ar, got 0.5"),
        ({"mode": "verified"}, "mode verified needs an adapter"),
        ({"threshold": 1.5}, r"must be in \(0, 1\], got 1.5"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        chat(ChatConfig(checkpoint=MODEL, device="cpu", **options))


def test_a_plain_checkpoint_talks_token_by_token_alone(monkeypatch, capsys):
    lines = iter(["/diffusion", "/verified", PROBLEM, "/quit"])
    monkeypatch.setattr(chat_module, "read_line", lambda _: next(lines))
    chat(ChatConfig(checkpoint=str(ROOT / "data/tiny"), device="cpu"))
    written = capsys.readouterr().out
    assert "error: this checkpoint was never adapted to block diffusion" in written.replace("\n", " ")
    assert "error: mode verified needs an adapter" in written.replace("\n", " ") and "#### 15\n" in written
    assert "1.00 tokens per forward" in written


@pytest.mark.slow
def test_it_can_be_scripted_through_a_pipe():
    lines = f"/threshold 2\n{PROBLEM}\n/new\n/ar\n{PROBLEM}\n"
    command = [sys.executable, "-m", "fastdllm.demo", "chat", "--checkpoint", MODEL, "--device", "cpu"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    written = done.stdout.splitlines()
    assert written[0].startswith("error: decode.threshold of policy threshold must be in (0, 1], got 2.0")
    assert written.count("#### 15") == 2 and "\x1b" not in done.stdout
    assert written[-1].endswith("prompt tokens kept")


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_chat():
    command = [sys.executable, "-m", "fastdllm.demo", "chat", "--checkpoint", MODEL, "--device", "cpu"]
    command += ["--threshold", "1.0", "--max_new_tokens", "900"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        os.execv(command[0], command)
    written = ""

    def read_until(text, seconds=90):
        nonlocal written
        end = time.monotonic() + seconds
        while text not in written:
            assert time.monotonic() < end, f"no {text!r} in {written!r}"
            if select.select([terminal], [], [], 1)[0]:
                written += os.read(terminal, 65536).decode(errors="replace")
        before, _, written = written.partition(text)
        return before

    try:
        read_until("> ")
        os.write(terminal, b"write something long without an end please\n")
        read_until("\u2591")  # masked places are shown
        os.write(terminal, b"\x03")
        read_until("stopped")
        os.write(terminal, b"/new\n/threshold 0.9\n" + PROBLEM.encode() + b"\n")
        read_until("#### 15")
        read_until("tokens per forward")
        os.write(terminal, b"/quit\n")
        assert os.waitpid(process, 0)[1] == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise


def test_the_page_talks_to_the_model_and_a_closed_tab_frees_the_slot(driver, listener):
    listener.speaker.usual = replace(listener.speaker.usual, threshold=1.0)
    app = app_of(listener)
    with running(app) as address:
        driver.get(address)
        driver.execute_script("sessionStorage.clear()")
        driver.refresh()
        ask(driver, PROBLEM)
        assert until(lambda: shown(driver, ".turn .masked"))  # masked places of the block in work
        assert until(lambda: "prompt tokens kept" in str(cards(driver)))
        assert "#### 15" in str(cards(driver)) and not find(driver, ".turn .masked")
        ask(driver, OTHER)
        assert until(lambda: listener.service.counts()["running"] == 1)
        driver.get("about:blank")
        assert until(lambda: listener.service.counts()["running"] == 0)
        assert listener.service.counts()["ended"] == 2


@pytest.mark.slow
def test_the_page_is_served_beside_openai_s_protocol_until_ctrl_c():
    command = [sys.executable, "-m", "fastdllm.demo", "chat", "--checkpoint", MODEL, "--device", "cpu", "--web"]
    program = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", program.stdout.readline())[0]
        assert "<title>Chat</title>" in httpx2.get(address).text
        lines = httpx2.post(f"{address}/chat", json={"messages": [user(PROBLEM)]}).text.splitlines()
        assert json.loads(lines[-1])["end"] == "stop" and any("#### 15" in line or "15" in line for line in lines)
        body = {"messages": [user(PROBLEM)]}
        answer = httpx2.post(f"{address}/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"].endswith("#### 15")
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
        assert program.returncode == 0 and errors == ""
    finally:
        program.kill()


def test_what_keeps_the_page_from_being_served_is_said_before_the_model_is_loaded(monkeypatch):
    config = ChatConfig(checkpoint="nowhere", web=True, port=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"cannot listen at 127.0.0.1, port {port}: .* try another --port"):
            chat(replace(config, port=port))
    monkeypatch.setattr(command_module, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(RuntimeError, match=r'chat --web needs uvicorn, .* pip install -e "\.\[serve\]"'):
        chat(config)


def test_an_adapter_s_drafts_are_verified_and_the_answer_is_that_of_mode_ar(tmp_path, monkeypatch, capsys):
    plain = str(ROOT / "data/tiny")
    model = load_checkpoint(plain).model()
    add_adapter(model, AdapterSettings(rank=2), seed=0)
    save_adapter(model, tmp_path / "drafts", base="tiny")
    lines = iter(["/diffusion", PROBLEM, "/new", "/ar", PROBLEM, "/verified", "/threshold 0.5", "/quit"])
    monkeypatch.setattr(chat_module, "read_line", lambda _: next(lines))
    chat(ChatConfig(checkpoint=plain, adapter=str(tmp_path / "drafts"), device="cpu"))
    written = capsys.readouterr().out
    assert "error: the adapter drafts for mode verified alone" in written.replace("\n", " ")
    answers = re.findall(r"Tom .*\n#### 15\n(.*)\n", written)
    assert len(answers) == 2 and len(set(re.findall(r"Tom .*\n#### 15\n", written))) == 1
    assert "drafts, verified token by token\nerror: a threshold has no effect in mode verified" in written
