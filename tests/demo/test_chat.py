"""The chat: a conversation becomes a request; commands; what a terminal shows while an answer comes, and a pipe."""

import io
import json
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import make_qwen
from rich.console import Console

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.demo.conversation import ChatSettings, Cost, Moment, Speaker
from fastdllm.demo.terminal import TerminalChat, describe, paint, read_line
from fastdllm.model import BlockDiffusionLM

MASK, STOP = 259, 258  # of the byte tokenizer
COST = Cost(num_tokens=10, seconds=0.5, tokens_per_forward=2.5, num_prompt_tokens=40, cached_tokens=32)


def make_speaker(tokenizer, mode="diffusion", context="block", limit=500, decode=None):
    model = BlockDiffusionLM(make_qwen(), block_size=8, mask_token_id=MASK, context_attention=context)
    return Speaker(model, tokenizer, mode, decode or DecodeConfig(threshold=0.7, sub_block_size=4), limit)


class Recorded:
    """A service that says what it was given beforehand; remembers what it was asked, and what was broken off."""

    def __init__(self, *answers, end="stop"):
        self.answers, self.end, self.asked, self.left = list(answers), end, [], 0

    @contextmanager
    def ask(self, messages, settings):
        self.asked.append(([dict(message) for message in messages], settings))
        moments = self.answers.pop(0)

        def come():
            for moment in moments:
                if isinstance(moment, BaseException):
                    raise moment
                yield moment

        try:
            yield Answer(come(), self.end)
        finally:
            self.left += 1


class Answer:
    cost = COST

    def __init__(self, moments, end):
        self.moments, self.end = moments, end

    def __iter__(self):
        return self.moments


def chat(tokenizer, lines, *answers, speaker=None, is_terminal=False, end="stop", width=40, height=12, **options):
    """Give the lines to a chat; return what it wrote, the service and the chat."""
    speaker, out, service = speaker or make_speaker(tokenizer), io.StringIO(), Recorded(*answers, end=end)
    console = Console(file=out, force_terminal=is_terminal, width=width, height=height, highlight=False, **options)
    waiting = list(lines)

    def read(prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    talk = TerminalChat(speaker, service, speaker.usual, console=console, read=read, frames=0)
    talk.run()
    return out.getvalue(), service, talk


def said(text):
    return [Moment(text, [])]


def test_a_pipe_gets_plain_lines_and_the_conversation_grows(byte_tokenizer):
    first = [Moment("Hel", ["lo", None]), Moment("lo\nyou", []), Moment("", [])]
    written, service, _ = chat(byte_tokenizer, [" one ", "", "two"], first, said("2"))
    note = "10 tokens · 20 tokens/s · 2.50 tokens per forward · 32 of 40 prompt tokens kept"
    assert written == f"Hello\nyou\n{note}\n2\n{note}\n"
    one, answer, two = ({"role": role, "content": text} for role, text in
                        (("user", "one"), ("assistant", "Hello\nyou"), ("user", "two")))  # fmt: skip
    assert [messages for messages, _ in service.asked] == [[one], [one, answer, two]]


def test_commands_change_the_settings_that_the_next_answer_is_asked_with(byte_tokenizer):
    speaker = make_speaker(byte_tokenizer, context="causal")
    lines = ["/threshold 0.8", "/reuse 3 middle", "a", "/ar", "b", "/verified", "c", "/diffusion", "/reuse 1", "d"]
    written, service, _ = chat(byte_tokenizer, lines, *[said("x")] * 4, speaker=speaker)
    usual = dict(threshold=0.8, subset="middle")
    expected = [("diffusion", 3), ("ar", 3), ("verified", 3), ("diffusion", 1)]
    assert [settings for _, settings in service.asked] == [
        ChatSettings(mode=mode, reuse_k=reuse_k, **usual) for mode, reuse_k in expected
    ]
    assert "by blocks, threshold 0.8, layers middle refreshed every 3 steps" in written


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/threshold", "/threshold needs a number, got ''; such as /threshold 0.8"),
        ("/threshold high", "/threshold needs a number, got 'high'"),
        ("/threshold 1.5", "must be in (0, 1], got 1.5"),
        ("/reuse", "/reuse takes a number and a subset, got ''; such as /reuse 2 middle"),
        ("/reuse 2 middle 3", "such as /reuse 2 middle"),
        ("/reuse two", "/reuse needs a number, got 'two'"),
        ("/reuse 0", "reuse_k must be 1 or more, got 0"),
        ("/reuse 2 top", "top"),
        ("/reuse 1 middle", "/reuse 1 reuses no layers, so 'middle' does nothing; leave it out."),
        ("/reuse 2 99", "99"),
        ("/reuse 2 'middle", "No closing quotation"),
        ("/verified", "needs an adapter that drafts (start with --adapter FOLDER)"),
        ("/tresholt 1", "no command /tresholt; did you mean /threshold?"),
        ("/etc/passwd", "no command /etc/passwd; /help lists them. A line that begins with a space is sent as it is."),
        ("/ar now", "/ar takes nothing behind it, got 'now'"),
        ("/save", "/save needs the name of a file"),
        ("/save x.jsonl", "the conversation is empty"),
    ],
)
def test_a_wrong_command_gives_the_reason_changes_nothing_and_the_chat_goes_on(byte_tokenizer, line, reason):
    written, service, _ = chat(byte_tokenizer, [line, " /etc is a folder"], said("yes"))
    assert f"error: {written.split('error: ')[1]}" in written and reason in written.replace("\n", " ")
    messages, settings = service.asked[0]
    assert settings == ChatSettings(mode="diffusion", threshold=0.7)
    assert messages == [{"role": "user", "content": "/etc is a folder"}] and written.count("yes\n") == 1


def test_what_rests_token_by_token_cannot_be_set_there(byte_tokenizer):
    written, _, _ = chat(byte_tokenizer, ["/ar", "/threshold 0.5", "/reuse 2 first"])
    assert written.count("has no effect in mode ar; /diffusion first.") == 2


@pytest.mark.parametrize(
    ("mode", "decode", "wrong", "reason"),
    [
        ("ar", DecodeConfig(), "diffusion", "never adapted to block diffusion"),
        ("ar", DecodeConfig(), "verified", "needs an adapter"),
        ("diffusion", DecodeConfig(), "verified", "needs an adapter"),
        ("diffusion", DecodeConfig(), "slow", "mode must be one of diffusion, ar, verified, got 'slow'"),
    ],
)
def test_a_mode_that_the_checkpoint_does_not_have_is_refused(byte_tokenizer, mode, decode, wrong, reason):
    speaker = make_speaker(byte_tokenizer, mode=mode, decode=decode)
    speaker.check(speaker.usual)
    with pytest.raises(ValueError, match=reason):
        speaker.check(ChatSettings(mode=wrong))


def test_settings_that_mean_the_same_share_an_engine(byte_tokenizer):
    speaker = make_speaker(byte_tokenizer)
    plain = speaker.options(ChatSettings(mode="diffusion"))
    assert speaker.options(ChatSettings(mode="diffusion", threshold=0.5, subset="middle")) == plain
    reusing = ChatSettings(mode="diffusion", reuse_k=2, subset="middle")
    assert speaker.options(reusing)[2] == ReuseConfig(reuse_k=2, subset="middle")
    assert speaker.options(replace(reusing, mode="ar"))[2] == ReuseConfig()


def test_with_an_adapter_blocks_are_refused(byte_tokenizer):
    speaker = make_speaker(byte_tokenizer, context="causal", decode=DecodeConfig(policy="verified"))
    speaker.model.gate = object()
    speaker.check(speaker.usual)
    speaker.check(ChatSettings(mode="ar"))
    with pytest.raises(ValueError, match="start without --adapter"):
        speaker.check(ChatSettings(mode="diffusion"))


def test_the_request_has_the_template_s_tokens_the_settings_and_what_room_there_is(byte_tokenizer):
    speaker = make_speaker(byte_tokenizer, limit=60)
    messages = [{"role": "user", "content": "abc"}]
    prompt = byte_tokenizer("<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n").input_ids
    request = speaker.request(messages, ChatSettings(mode="diffusion", threshold=0.6), 500, seed=3)
    assert (request.prompt, request.max_new_tokens) == (prompt, 60 - len(prompt))
    assert (request.parameter, request.seed) == (0.6, 3)
    assert speaker.request(messages, ChatSettings(mode="ar"), 5, seed=0).parameter is None
    assert speaker.request(messages, ChatSettings(mode="ar"), 5, seed=0).max_new_tokens == 5
    with pytest.raises(ValueError, match=r"has 60 tokens and leaves no room .* 60; begin a new one \(/new\)"):
        speaker.request([{"role": "user", "content": "a" * (63 - len(prompt))}], speaker.usual, 5, seed=0)


def test_a_draft_is_shown_up_to_where_the_answer_would_end(byte_tokenizer):
    speaker = make_speaker(byte_tokenizer)
    letters = byte_tokenizer("abc").input_ids
    pieces = speaker.draft_pieces([letters[0], letters[1], None, None, letters[2], STOP, letters[0], None], {STOP})
    assert pieces == ["ab", None, None, "c"]
    assert speaker.draft_pieces([None], {STOP}) == [None] and speaker.draft_pieces([], {STOP}) == []


def test_a_terminal_shows_masked_places_fill_in_and_keeps_the_answer(byte_tokenizer):
    moments = [Moment("", [None, None, None]), Moment("one", [None, "two"]), Moment(" x\ntwo", []), Moment("", [None])]
    written, _, _ = chat(byte_tokenizer, ["go"], moments, is_terminal=True, no_color=True)
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)  # without colours and forms
    shown = [plain.index(picture) for picture in ("▏░░░", "one▏░two", "one x\n", "two▏░", "two\n\r", "10 tokens")]
    assert shown == sorted(shown)
    assert "░" not in plain[shown[-2] :] and "32 of 40 prompt tokens kept" in plain[shown[-1] :]


def test_final_provisional_and_masked_are_told_apart_without_colour():
    text = paint("sure ", ["may\nbe", None])
    assert text.plain == "sure ▏may⏎be░"
    console = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=80)
    console.print(text)
    assert "\x1b[3;4mmay⏎be" in console.file.getvalue()  # italic and underlined
    assert paint("all", []).plain == "all"


def test_an_answer_longer_than_the_screen_shows_its_end(byte_tokenizer):
    long = "word " * 200
    written, _, _ = chat(byte_tokenizer, ["go"], [Moment(long + "END", [None])], is_terminal=True, width=20, height=6)
    picture = written.split("░")[0]
    assert "END" in picture and picture.count("word") < 30
    assert written.split("░")[1].count("word") == 200  # printed whole when it has ended


def test_nothing_that_the_model_writes_commands_the_terminal(byte_tokenizer):
    written, _, talk = chat(
        byte_tokenizer, ["go"], [Moment("a\x1b[2Jb\r\x07", ["\x1b[0m"]), Moment("c", [])], is_terminal=True
    )
    assert "\x1b[2J" not in written and "a␛[2Jb␍␇" in written
    assert talk.messages[-1]["content"] == "a\x1b[2Jb\r\x07c"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_final(byte_tokenizer):
    stopped = [Moment("half", ["x"]), KeyboardInterrupt()]
    lines = ["one", KeyboardInterrupt(), "two", "three"]
    written, service, _ = chat(byte_tokenizer, lines, stopped, [KeyboardInterrupt()], said("3"))
    assert written.startswith("half\nstopped\nCtrl-C stops an answer; /quit or Ctrl-D leaves\nstopped\n3\n")
    assert service.left == 3  # each was left, so that its slot is free
    contents = [message["content"] for message in service.asked[-1][0]]
    assert contents == ["one", "half", "three"]  # a question that got no answer is forgotten


def test_an_error_of_the_service_is_said_and_the_question_forgotten(byte_tokenizer):
    failing = [RuntimeError("out of memory")]
    written, service, _ = chat(byte_tokenizer, ["one", "two"], failing, said("2"))
    assert written.startswith("error: out of memory\n2\n")
    assert [message["content"] for message in service.asked[1][0]] == ["two"]


def test_new_system_and_save(byte_tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = [
        "/system Be short.",
        "one",
        "/new",
        "two",
        f"/save {file}",
        f"/save {file}",
        "/system",
        "three",
        "/quit",
        "x",
    ]
    written, service, _ = chat(byte_tokenizer, lines, said("1"), said("2"), said("3"))
    told = {"role": "system", "content": "Be short."}
    two = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}]
    assert [messages for messages, _ in service.asked] == [
        [told, {"role": "user", "content": "one"}],
        [told, two[0]],
        [*two, {"role": "user", "content": "three"}],
    ]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"messages": [told, *two]}]
    assert f"error: {file} is there already; name another file." in written


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(byte_tokenizer):
    moments = [Moment("a\nb", ["c", None]), Moment("c", [])]
    written, _, _ = chat(byte_tokenizer, ["go"], moments, is_terminal=True, _environ={"TERM": "dumb"})
    assert written.startswith("a\nbc\n") and "░" not in written and "\x1b" not in written
    written, _, _ = chat(byte_tokenizer, ["go"], said("\x1b[2J"), is_terminal=True, _environ={"TERM": "dumb"})
    assert written.startswith("␛[2J\n")  # nor may the model move it


def test_lines_of_a_pipe_are_read_whatever_their_bytes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\r\n\nlast")))
    assert [read_line("> ") for _ in range(3)] == ["caf\ufffd", "", "last"]
    with pytest.raises(EOFError):
        read_line("> ")


def test_an_empty_answer_is_an_answer(byte_tokenizer):
    _, service, _ = chat(byte_tokenizer, ["one", "two"], said(""), said("2"))
    assert [message["content"] for message in service.asked[1][0]] == ["one", "", "two"]


def test_help_names_every_command_and_a_cut_answer_says_so(byte_tokenizer):
    written, _, _ = chat(byte_tokenizer, ["/help", "go"], said("x"), end="length")
    for name in ("/threshold 0.8", "/reuse 2 middle", "/ar", "/verified", "/new", "/save FILE", "/quit"):
        assert f"\n{name}" in f"\n{written}"
    assert "cut at the limit (--max_new_tokens)" in written
    assert describe(ChatSettings(mode="verified")) == "drafts, verified token by token"
