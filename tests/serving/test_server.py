"""A live server on the loopback: the openai client, lm-eval, clients that hang up, and many at once."""

import asyncio
import http.client
import json
import time

import load_server
import openai
import pytest
from decoding.test_engine import make_model
from pages import ROOT

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.text import load
from fastdllm.evaluation.tasks import find_task
from fastdllm.serving.service import Service
from serving.live import live

PROBLEM = "Tom has 12 pens. He buys 7 more pens. He loses 4 pens. How many pens does Tom have now?"


@pytest.fixture(scope="module")
def source():
    return load(str(ROOT / "data/tiny-adapted"))


@pytest.fixture(scope="module")
def service(source):
    with Service(source.model, source.tokenizer, decode=source.decode, max_tokens=512) as made:
        yield made


@pytest.fixture(scope="module")
def url(service):
    with live(service, name="tiny-adapted", api_key="sesame") as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as made:
        yield made


def ask(client, **fields):
    messages = [{"role": "user", "content": PROBLEM}]
    return client.chat.completions.create(**{"model": "tiny-adapted", "messages": messages} | fields)


def test_the_openai_client_chats(client, source):
    expected = source.generate(PROBLEM)
    answer = ask(client)
    assert answer.choices[0].message.content == expected and "#### 15" in expected
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.role == "assistant"
    assert answer.usage.fastdllm["tokens_per_forward"] > 2
    stream = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == expected
    assert stream[-1].usage.completion_tokens == answer.usage.completion_tokens and not stream[-1].choices
    assert stream[-1].usage.prompt_tokens_details.cached_tokens == 32


def test_a_second_turn_is_read_from_where_the_first_one_ended(client, source):
    first = {"role": "user", "content": "Ann has 40 coins. She gets 5 more coins. How many coins does Ann have now?"}
    said = ask(client, messages=[first]).choices[0].message
    second = {"role": "user", "content": "Ann has 41 coins. She loses 5 coins. How many coins does Ann have now?"}
    history = [first, said.model_dump(), second]
    answer = ask(client, messages=history)
    plain = [{"role": one["role"], "content": one["content"]} for one in history]
    assert answer.choices[0].message.content == source.generate(plain)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 64


def test_the_openai_client_sets_what_this_server_adds(client, source):
    plain = ask(client, extra_body={"mode": "ar"})
    assert plain.usage.fastdllm["tokens_per_forward"] == 1
    assert plain.choices[0].message.content == source.generate(PROBLEM)
    careful = ask(client, extra_body={"threshold": 1.0, "reuse_k": 2, "subset": "last"})
    assert careful.usage.fastdllm["tokens_per_forward"] < 1.1
    assert ask(client, extra_body={"policy": "entropy"}).choices[0].message.content
    drawn = ask(client, temperature=1.9, top_p=0.99, seed=5, max_tokens=20).choices[0].message.content
    assert drawn == source.generate(PROBLEM, temperature=1.9, top_p=0.99, seed=5, max_new_tokens=20)


def test_the_openai_client_completes_and_lists(client, source):
    prompt = "<|im_start|>user\n" + PROBLEM + "<|im_end|>\n<|im_start|>assistant\n"
    answer = client.completions.create(model="tiny-adapted", prompt=prompt, max_tokens=80, stop="\n")
    expected = source.generate(PROBLEM).split("\n")[0]
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "stop"
    short = client.completions.create(model="tiny-adapted", prompt=prompt, max_tokens=3, stream=True)
    chunks = list(short)
    assert expected.startswith("".join(chunk.choices[0].text for chunk in chunks))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["tiny-adapted"]
    assert client.models.retrieve("tiny-adapted").owned_by == "fastdllm"


def test_the_openai_client_knows_the_errors(client, url):
    for kind, fields in (
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.BadRequestError, {"max_tokens": 5000}),
        (openai.BadRequestError, {"frequency_penalty": 1}),
        (openai.BadRequestError, {"extra_body": {"threshold": 7}}),
        (openai.BadRequestError, {"stream": True, "temperature": 9}),
    ):
        with pytest.raises(kind) as caught:
            ask(client, **fields)
        assert caught.value.body["message"] and caught.value.body["type"].endswith("error")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as other, pytest.raises(openai.AuthenticationError):
        ask(other)


def test_lm_eval_measures_through_the_server_what_the_engine_answers(url, source, monkeypatch):
    import lm_eval.models  # else it registers none of its own where ours is registered already

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    manager, spec = find_task("tiny_problems")
    results = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": "tiny-adapted", "base_url": f"{url}/v1/chat/completions", "num_concurrent": 3,
                    "max_retries": 1},
        tasks=[spec],
        task_manager=manager,
        limit=6,
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
    )  # fmt: skip
    samples = results["samples"]["tiny_problems"]
    assert len({sample["doc_id"] for sample in samples}) == 6
    for sample in samples:
        assert sample["resps"][0][0] == source.generate(sample["doc"]["prompt"], max_new_tokens=128)
    assert results["results"]["tiny_problems"]["exact_match,strict-match"] == 1.0


def test_many_at_once_are_neither_lost_nor_mixed_up(url, source):
    questions = load_server.make_questions(32)
    expected = load_server.own_answers(source, questions)
    tally = asyncio.run(load_server.ask_server(url, "tiny-adapted", questions, expected, 4, api_key="sesame"))
    assert (tally.answered, tally.lost, tally.different, tally.still_running) == (32, 0, 0, 0)
    assert tally.dropped == 4 and tally.streamed == 16 and len({text for text, _ in expected}) > 28


def test_a_mixed_up_answer_would_be_noticed(url, source):
    questions = load_server.make_questions(2)
    expected = load_server.own_answers(source, questions)
    tally = asyncio.run(load_server.ask_server(url, "tiny-adapted", questions, expected[::-1], 0, api_key="sesame"))
    assert tally.different == 2
    tally = asyncio.run(load_server.ask_server(url, "other", questions, expected, 0, api_key="sesame"))
    assert tally.lost == 2


@pytest.fixture
def slow(byte_tokenizer):
    """A service with one slot, in which an answer takes hundreds of passes; and the answers that it was asked for."""
    decode = DecodeConfig(threshold=1.0, sub_block_size=4)
    with Service(make_model(), byte_tokenizer, decode=decode, batch_size=1, max_tokens=400) as service:
        submit, service.asked = service.submit, []

        def spy(*arguments, **options):
            service.asked.append(submit(*arguments, **options))
            return service.asked[-1]

        service.submit = spy
        yield service


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(slow, is_streamed):
    body = json.dumps({"prompt": "a", "max_tokens": 390, "stream": is_streamed})
    with live(slow) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if is_streamed:
            response = connection.getresponse()
            assert response.readline().startswith(b"data: ")
            response.close()
        while not slow.asked or not slow.asked[0].tokens:
            time.sleep(0.001)
        connection.close()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            assert client.completions.create(model="tiny", prompt="b", max_tokens=3).choices[0].text is not None
    assert slow.asked[0].is_cancelled and len(slow.asked[0].tokens) < 390
    assert slow.counts() == dict(waiting=0, running=0, ended=2, engines=1)
