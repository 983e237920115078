"""The application without a network: limits, errors in the protocol's form, and whatever a client may send."""

import json

import pytest
from decoding.test_engine import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.rows import Request
from fastdllm.serving import replies
from fastdllm.serving.app import AppSettings, make_app
from fastdllm.serving.bodies import HARMLESS, NOTHING_ASKED, ChatBody, TextBody
from fastdllm.serving.service import Service

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
TEXT = {"prompt": "hello", "max_tokens": 5}
PLACES = {"/v1/chat/completions": HELLO, "/v1/completions": TEXT}


@pytest.fixture(scope="module")
def service(byte_tokenizer):
    decode = DecodeConfig(threshold=0.4, sub_block_size=4)
    with Service(make_model(), byte_tokenizer, decode=decode, batch_size=4, max_tokens=200, max_waiting=64) as made:
        yield made


def make_client(service, **options):
    settings = AppSettings(name="tiny", max_body_bytes=5000, default_new_tokens=20, **options)
    extra = [Route("/own", lambda request: JSONResponse({"own": True}))]
    return TestClient(make_app(service, settings, extra), base_url="http://localhost")


@pytest.fixture(scope="module")
def client(service):
    return make_client(service)


def error_of(response, status):
    assert response.status_code == status
    assert response.json().keys() == {"error"} and response.json()["error"].keys() == {
        "message",
        "type",
        "param",
        "code",
    }
    return response.json()["error"]


def events_of(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("path", PLACES)
def test_chunks_join_to_the_whole_and_usage_comes_when_it_is_asked_for(client, path):
    body = PLACES[path] | {"max_tokens": 40, "n": 2}
    whole = client.post(path, json=body).json()
    chunks = events_of(client.post(path, json=body | {"stream": True}))
    assert all("usage" not in chunk for chunk in chunks) and len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        said = [one["delta"].get("content", "") if "delta" in one else one["text"] for one in own]
        assert "".join(said) == (choice["message"]["content"] if "message" in choice else choice["text"])
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"] and len(own) > 2
    *chunks, last = events_of(
        client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert all(chunk["usage"] is None for chunk in chunks) and last["choices"] == []
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][name] for name in names] == [whole["usage"][name] for name in names]
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]


def test_usage_says_what_was_kept_and_what_it_took(client):
    ids = list(range(60, 100))
    first = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 9}).json()["usage"]
    again = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 9}).json()["usage"]
    assert first["prompt_tokens"] == 40 and first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] == 32
    took = again["fastdllm"]
    assert took["tokens_per_forward"] == round(again["completion_tokens"] / (
        took["denoise_passes"] + took["append_passes"]
    ), 4)  # fmt: skip


def test_several_prompts_and_choices_are_answered_in_order(service, client):
    body = TEXT | {"prompt": ["one", "two"], "n": 2, "temperature": 1, "seed": 7, "max_tokens": 12}
    choices = client.post("/v1/completions", json=body).json()["choices"]
    for index, prompt, number in ((0, "one", 0), (1, "one", 1), (2, "two", 0), (3, "two", 1)):
        ids = service.tokenizer(prompt).input_ids
        request = Request(prompt=ids, max_new_tokens=12, seed=7 + number)
        decode = DecodeConfig(threshold=0.4, sub_block_size=4, temperature=1.0)
        expected = service.submit(request, decode=decode).result()
        assert choices[index]["index"] == index and choices[index]["text"] == expected.text
    assert choices[0]["text"] != choices[1]["text"]


def test_without_a_seed_draws_differ_and_without_a_temperature_nothing_does(client):
    def ask(**fields):
        return client.post("/v1/completions", json=TEXT | {"max_tokens": 30} | fields).json()["choices"][0]["text"]

    assert len({ask(temperature=1.5) for _ in range(3)}) > 1
    assert len({ask() for _ in range(3)}) == len({ask(temperature=1.5, seed=3) for _ in range(3)}) == 1


def test_equal_prompts_are_drawn_apart_unless_they_share_a_seed(client):
    def texts(**fields):
        body = {"prompt": ["one", "one"], "n": 2, "max_tokens": 30, "temperature": 1.5}
        return [choice["text"] for choice in client.post("/v1/completions", json=body | fields).json()["choices"]]

    assert len(set(texts())) == 4
    first, second, *again = texts(seed=3)
    assert first != second and again == [first, second]
    assert len(set(texts(temperature=0))) == 1


def test_why_an_answer_ended_is_told_by_its_tokens(client, service):
    whole = client.post("/v1/completions", json=TEXT | {"max_tokens": 30}).json()["choices"][0]
    assert whole["finish_reason"] == "length" and len(whole["text"]) > 12
    for stop in (whole["text"][8:10], whole["text"][-1:]):
        cut = client.post("/v1/completions", json=TEXT | {"max_tokens": 30, "stop": stop}).json()["choices"][0]
        assert cut["finish_reason"] == "stop" and cut["text"] == whole["text"].split(stop)[0]


def test_a_body_that_is_too_large_is_refused(client):
    for content in (b" " * 5001, iter([b" " * 3000, b" " * 3000])):
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert "5,000 bytes" in error_of(response, 413)["message"]


def test_more_tokens_than_there_may_be_are_refused_with_the_number_that_fits(client):
    error = error_of(client.post("/v1/completions", json={"prompt": [7] * 150, "max_tokens": 51}), 400)
    assert error["code"] == "context_length_exceeded" and "at most 50 new ones" in error["message"]
    assert client.post("/v1/completions", json={"prompt": [7] * 195}).status_code == 200  # gets what is left
    assert "shorten the prompt" in error_of(client.post("/v1/completions", json={"prompt": [7] * 200}), 400)["message"]
    error = error_of(client.post("/v1/completions", json=TEXT | {"prompt": ["a"] * 33, "n": 2}), 400)
    assert "at most 64, got 33 times 2" in error["message"]


def test_more_than_could_ever_wait_is_refused_for_good(byte_tokenizer):
    with Service(make_model(), byte_tokenizer, batch_size=16, max_tokens=200, max_waiting=4) as small:
        client = make_client(small)
        for path, body in PLACES.items():
            assert "at most 4, got 1 times 5" in error_of(client.post(path, json=body | {"n": 5}), 400)["message"]
            assert client.post(path, json=body | {"n": 4}).status_code == 200


def test_more_prompts_than_there_may_be_are_not_read(service, monkeypatch):
    read = []
    monkeypatch.setattr(service, "tokenizer", lambda *arguments, **options: read.append(arguments))
    error_of(make_client(service).post("/v1/completions", json=TEXT | {"prompt": ["a"] * 65}), 400)
    assert read == []


def test_when_too_many_wait_all_of_a_body_is_refused_and_nothing_of_it_stays(client, service):
    others = [service.submit(Request(prompt=[1], max_new_tokens=190)) for _ in range(50)]
    body = {"prompt": [[number] for number in range(30)], "max_tokens": 150}
    response = client.post("/v1/completions", json=body)
    assert error_of(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "1"
    for other in others:
        other.cancel()
    assert client.post("/v1/completions", json=TEXT).status_code == 200
    assert client.get("/health").json()["waiting"] == 0


def test_other_content_types_paths_methods_models_and_hosts_are_refused(client, service):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
        assert "must be application/json" in error_of(response, 415)["message"]
    assert error_of(client.get("/v2"), 404)["type"] == "not_found_error"
    response = client.get("/v1/completions")
    assert error_of(response, 405)["message"] == "GET does nothing at /v1/completions." and response.headers["allow"]
    assert error_of(client.post("/v1/completions", json=TEXT | {"model": "x"}), 404)["code"] == "model_not_found"
    assert error_of(client.get("/v1/models/x"), 404)["param"] == "model"
    assert client.get("/v1/models/tiny").json() == client.get("/v1/models").json()["data"][0]
    local = make_client(service, hosts=("localhost", "[::1]"))
    assert local.get("/health").status_code == local.get("/health", headers={"host": "[::1]:80"}).status_code == 200
    assert local.get("/health", headers={"host": "LOCALHOST:8000"}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:80", "[::2]"):
        error_of(local.get("/health", headers={"host": host}), 421)


def test_the_api_key_opens_all_but_health(service):
    client = make_client(service, api_key="sesame")
    assert client.get("/health").status_code == 200
    for path in ("/v1/models", "/own", "/nowhere"):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic sesame"},
            {"authorization": ""},
        ):
            response = client.get(path, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/own", headers={"authorization": "Bearer sesame"}).json() == {"own": True}


def test_an_answer_that_fails_is_an_error_whole_or_in_the_stream(client, monkeypatch, service):
    from fastdllm.decoding.forward import PlainForward

    def fail(*arguments, **options):
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(PlainForward, "__call__", fail)
        error = error_of(client.post("/v1/completions", json=TEXT), 500)
        assert "the device is on fire" in error["message"] and error["type"] == "server_error"
        *_, last = events_of(client.post("/v1/completions", json=TEXT | {"stream": True}))
        assert "the device is on fire" in last["error"]["message"]
    assert client.post("/v1/completions", json=TEXT).status_code == 200


def test_what_nobody_thought_of_is_an_error_in_the_same_form(service, monkeypatch):
    def fail(*arguments):
        raise KeyError("thing")

    monkeypatch.setattr(replies.Reply, "_usage", fail)
    client = TestClient(make_client(service).app, raise_server_exceptions=False)
    assert error_of(client.post("/v1/completions", json=TEXT), 500)["message"] == "the server failed: KeyError."


def test_a_template_that_refuses_the_messages_is_told_to_the_client(client, service, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(service.tokenizer, "chat_template", template)
    error = error_of(client.post("/v1/chat/completions", json=HELLO), 400)
    assert "roles must alternate" in error["message"] and error["param"] == "messages"


FIELDS = sorted({*ChatBody.model_fields, *TextBody.model_fields, *HARMLESS, *NOTHING_ASKED})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)
LIKELY = st.sampled_from(
    [0, 1, 2, 5, 0.5, 1.0, -1, "a", "ar", "entropy", "fixed", "verified", ["a"], [3], [[3], [4]], [[300]], True,
     [{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text", "text": "|<MASK>|"}]}],
     {"include_usage": True}, "first", "1,2", "delta", "output", 2**62, 1e300]
)  # fmt: skip
POLICIES = st.sampled_from(["threshold", "factor", "profile", "entropy", "margin", "fixed", "verified"])
TYPED = {  # values of the right types, so that what is behind the first check is reached too
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "seed": st.integers(-(2**62), 2**62),
    "stop": st.lists(st.text(max_size=3), max_size=5) | st.text(max_size=3),
    "n": st.integers(1, 9),
    "stream": st.booleans(),
    "max_tokens": st.integers(1, 210),
    "mode": st.sampled_from(["diffusion", "ar"]),
    "threshold": st.floats(),
    "policy": POLICIES | st.text(),
    "policy_parameter": st.floats(),
    "reuse_k": st.integers(),
    "subset": st.sampled_from(["first", "middle", "last", "1,2", "9"]) | st.text(),
    "reuse_mode": st.sampled_from(["output", "delta", "attn", "output_by_layer"]) | st.text(),
    "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}), max_size=3),
    "prompt": st.text() | st.lists(st.integers(-1, 280), max_size=9) | st.lists(st.text(max_size=5), max_size=3),
}
ONE_ANY = st.dictionaries(st.sampled_from(FIELDS), LIKELY | VALUES, max_size=1)
SOME_TYPED = st.lists(st.sampled_from(sorted(TYPED)), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: TYPED[name] for name in names})
)
BODIES = ONE_ANY | SOME_TYPED


SETTINGS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def fuzzed(byte_tokenizer):
    """A client that takes a server's error as an answer, of a service that nothing else uses."""
    with Service(make_model(context="causal"), byte_tokenizer, batch_size=4, max_tokens=200) as service:
        settings = AppSettings(name="tiny", max_body_bytes=5000)
        yield TestClient(make_app(service, settings), base_url="http://localhost", raise_server_exceptions=False)


def check_answer(response):
    """An answer, or an error in the protocol's form that is not the server's fault."""
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert error_of(response, response.status_code)["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert not any("error" in event for event in events_of(response))
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in response.json()["choices"])


@settings(max_examples=300, **SETTINGS)
@given(path=st.sampled_from(sorted(PLACES)), fields=BODIES)
def test_no_field_of_any_kind_is_the_server_s_fault(fuzzed, path, fields):
    other = "prompt" if "messages" in PLACES[path] else "messages"
    fields = {name: value for name, value in fields.items() if name != other}
    body = json.dumps(PLACES[path] | fields).encode()
    check_answer(fuzzed.post(path, content=body, headers={"content-type": "application/json"}))


@settings(max_examples=100, **SETTINGS)
@given(path=st.sampled_from(sorted(PLACES)), body=st.binary(max_size=60) | VALUES | st.text())
def test_no_content_of_any_kind_is_the_server_s_fault(fuzzed, path, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    check_answer(fuzzed.post(path, content=content, headers={"content-type": "application/json"}))


@settings(max_examples=100, **SETTINGS)
@given(path=st.sampled_from(sorted(PLACES)), place=st.integers(0, 200), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damaged_body_is_the_server_s_fault(fuzzed, path, place, byte, cut):
    content = bytearray(json.dumps(PLACES[path] | {"temperature": 0.5, "stop": ["x"]}).encode())
    place %= len(content)
    content = content[:place] if cut else content[:place] + bytes([byte]) + content[place + 1 :]
    check_answer(fuzzed.post(path, content=bytes(content), headers={"content-type": "application/json"}))
