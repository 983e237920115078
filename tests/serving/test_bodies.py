"""What clients send: what is honoured, what is refused, and how that is said."""

import json

import pytest

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.serving.bodies import HARMLESS, NOTHING_ASKED, ChatBody, TextBody, parse_body
from fastdllm.serving.errors import ProtocolError

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def chat(**fields):
    return parse_body(ChatBody, json.dumps(HELLO | fields).encode())


def text(**fields):
    return parse_body(TextBody, json.dumps({"prompt": "hello"} | fields).encode())


def test_content_is_text_or_parts_of_it_and_developers_speak_as_the_system():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    body = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert body.history == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    echoed = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[*HELLO["messages"], echoed]).history[1] == {"role": "assistant", "content": "hi"}


def test_prompts_and_stops_may_be_one_or_several():
    assert text(prompt=["a", [1, 2]]).prompt == ["a", [1, 2]]
    assert text(prompt=[1, 2]).prompt == [[1, 2]] and text().prompt == ["hello"]
    assert chat(stop="x").stop == ("x",) and chat(stop=["x", "y"]).stop == ("x", "y")
    assert chat(stop=None).stop == chat().stop == ()


def test_fields_that_ask_for_nothing_or_change_nothing_are_taken():
    plain = chat()
    assert chat(**dict.fromkeys(HARMLESS, "anything")) == plain
    for name, values in NOTHING_ASKED.items():
        for value in (*values, None):
            assert chat(**{name: value}) == plain
    assert chat(max_tokens=None, temperature=None, stop=None, stream=None) == plain


@pytest.mark.parametrize("name", NOTHING_ASKED)
def test_fields_that_would_change_the_answer_are_refused_by_name(name):
    for value in (0.5, 1 if name != "best_of" else 2, True, {"x": 1}, [{"x": 1}]):
        with pytest.raises(ProtocolError, match=f"{name} is not supported") as caught:
            text(**{name: value})
        assert (caught.value.status, caught.value.param) == (400, name)
        assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "not a field that this server knows"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "must be a string or a list of text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content", "a part of content must be"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name", "not a field"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls",
         "not supported"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": 1e-9}, "temperature", "0 \\(greedy\\) or 0.01 to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**70}, "seed", "less than or equal"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"reuse_k": 2**64}, "reuse_k", "less than or equal"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 of them"),
        ({"stop": ""}, "stop", "none empty"),
        ({"stop": "x" * 1001}, "stop", "at most 1,000 characters"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "not a field"),
        ({"mode": "both"}, "mode", "'diffusion' or 'ar'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(fields, param, message):
    with pytest.raises(ProtocolError, match=message) as caught:
        chat(**fields)
    assert caught.value.status == 400 and caught.value.param == param
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [1, "a"], [1.5], [True], {"a": 1}, 7, [[1], []]])
def test_prompts_that_hold_nothing_or_something_else_are_refused(prompt):
    with pytest.raises(ProtocolError, match="prompt must") as caught:
        text(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b'{"messages": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}', b"\xff\xfe",
     b'{"prompt": ' + b"9" * 9000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(content):
    with pytest.raises(ProtocolError) as caught:
        parse_body(TextBody, content)
    assert caught.value.status == 400


def test_options_of_this_server_become_settings():
    decode = DecodeConfig(threshold=0.8, sub_block_size=4)
    assert chat().settings("diffusion", decode) == ("diffusion", decode, ReuseConfig())
    mode, chosen, reuse = chat(threshold=0.5, temperature=1, reuse_k=2, subset="last").settings("diffusion", decode)
    assert (mode, reuse) == ("diffusion", ReuseConfig(reuse_k=2, subset="last"))
    assert chosen == DecodeConfig(threshold=0.5, sub_block_size=4, temperature=1.0)
    assert chat(policy="entropy", policy_parameter=0.3).settings("diffusion", decode)[1] == DecodeConfig(
        policy="entropy", policy_parameter=0.3, sub_block_size=4
    )
    for usual in (decode, DecodeConfig(policy="verified")):  # of which mode ar reads nothing
        assert chat(mode="ar", top_p=0.5).settings("diffusion", usual)[:2] == ("ar", DecodeConfig(top_p=0.5))
    for fields, message in (
        ({"threshold": 2}, "threshold"),
        ({"policy": "best"}, "policy must be one of"),
        ({"policy": "entropy", "threshold": 0.5}, "does nothing in policy entropy"),
        ({"reuse_k": 0}, "reuse_k must be 1 or more"),
        ({"mode": "ar", "threshold": 0.5}, "no effect token by token"),
        ({"subset": "last"}, "subset does nothing without reuse_k"),
        ({"reuse_k": 1, "reuse_mode": "delta"}, "reuse_mode does nothing without reuse_k"),
    ):
        with pytest.raises(ProtocolError, match=message):
            chat(**fields).settings("diffusion", decode)


def test_the_two_names_of_the_limit_agree_or_are_refused():
    assert chat(max_completion_tokens=5).new_tokens == chat(max_tokens=5, max_completion_tokens=5).new_tokens == 5
    assert chat().new_tokens is None and text(max_tokens=3).new_tokens == 3
    with pytest.raises(ProtocolError, match="mean the same"):
        _ = chat(max_tokens=5, max_completion_tokens=6).new_tokens
