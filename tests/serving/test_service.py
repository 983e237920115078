"""The service: many threads, several engines, one model; each answer is the one that it would be alone."""

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoding.test_engine import MASK, make_model, make_prompts

from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Row
from fastdllm.serving import service as service_module
from fastdllm.serving.lanes import Lane
from fastdllm.serving.service import QueueFullError, Service

DECODE = DecodeConfig(threshold=0.4, sub_block_size=4)
SETTINGS = [  # of one request: parameter, then mode, decode and reuse
    (None, {}),
    (0.9, {}),
    (None, {"mode": "ar"}),
    (None, {"decode": DecodeConfig(sub_block_size=8, threshold=0.6)}),
    (None, {"decode": DecodeConfig(policy="factor", policy_parameter=0.5)}),
    (None, {"decode": DecodeConfig(temperature=0.8, top_p=0.9), "mode": "ar"}),
    (None, {"reuse": ReuseConfig(reuse_k=2, subset="middle", reuse_mode="delta")}),
]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def serve(byte_tokenizer, model):
    """Make services that are closed at the end."""
    made = []

    def make(**options):
        made.append(Service(model, byte_tokenizer, **{"decode": DECODE, "batch_size": 3, "max_tokens": 100} | options))
        return made[-1]

    yield make
    for service in made:
        service.close()


def make_requests(count, seed=0, length=40):
    chance = random.Random(seed)
    prompts = make_prompts([chance.randint(1, length) for _ in range(count)], seed)
    return [Request(prompt=prompt, max_new_tokens=chance.randint(1, 24), seed=seed) for prompt in prompts]


def alone(service, request, mode="diffusion", decode=DECODE, reuse=None):
    if mode == "ar":
        decode = DecodeConfig(temperature=decode.temperature, top_p=decode.top_p)
    engine = Engine(service.model, service.tokenizer, mode=mode, decode=decode, reuse=reuse, batch_size=1)
    return next(engine.run([request]))


def with_parameter(request, parameter):
    return Request(prompt=request.prompt, max_new_tokens=request.max_new_tokens, seed=5, parameter=parameter)


def test_many_threads_get_the_answers_that_engines_give_alone(serve):
    service = serve(max_engines=3)  # fewer than there are settings
    jobs = [
        (with_parameter(request, SETTINGS[number % 7][0]), SETTINGS[number % 7][1])
        for number, request in enumerate(make_requests(42))
    ]

    def ask(job):
        answer = service.submit(job[0], **job[1])
        tokens = [token for update in answer for token in update.tokens]
        return tokens, answer

    with ThreadPoolExecutor(14) as pool:
        found = list(pool.map(ask, jobs))
    for (request, options), (tokens, answer) in zip(jobs, found, strict=True):
        expected = alone(service, request, **options)
        assert answer.completion.tokens == tokens == expected.tokens
        assert answer.completion.text == expected.text and answer.completion.index == 0
        assert answer.seconds > 0 and not answer.error
    assert service.counts() == dict(waiting=0, running=0, ended=42, engines=3)


def test_turns_are_read_from_where_the_last_one_ended(serve):
    service, prompt = serve(), make_prompts((30,))[0]
    for turn in range(3):
        answer = service.submit(Request(prompt=prompt, max_new_tokens=12))
        assert answer.result().tokens == alone(service, answer.request).tokens
        assert (answer.cached_tokens > 0) == (turn > 0)
        prompt = prompt + answer.tokens + [turn]
    assert answer.cached_tokens >= 30 + 12


def test_settings_that_mean_the_same_share_an_engine(serve):
    service, request = serve(), Request(prompt=[1], max_new_tokens=3)
    for options in (
        {},
        {"decode": DecodeConfig(threshold=0.7, sub_block_size=4)},
        {"decode": DecodeConfig(sub_block_size=4, top_p=0.5)},
    ):
        service.submit(request, **options).result()
    assert service.counts()["engines"] == 1
    service.submit(request, mode="ar").result()
    service.submit(request, mode="ar", decode=DecodeConfig(threshold=0.2)).result()
    assert service.counts()["engines"] == 2


def test_a_service_that_verifies_answers_token_by_token_too(serve, byte_tokenizer):
    decode = DecodeConfig(policy="verified", temperature=0.8, top_p=0.9)
    with Service(make_model(context="causal"), byte_tokenizer, decode=decode, max_tokens=100) as service:
        request = Request(prompt=[1], max_new_tokens=9, seed=5)
        answer = service.submit(request, mode="ar")
        assert answer.result().tokens == alone(service, request, mode="ar", decode=decode).tokens
        with pytest.raises(ValueError, match="verified does nothing in mode ar"):
            service.submit(request, mode="ar", decode=decode)


def test_an_event_loop_reads_answers_as_threads_do(serve):
    service, requests = serve(), make_requests(12, seed=3)

    async def read(request):
        answer = service.submit(request)
        return [token async for update in answer for token in update.tokens]

    async def read_all():
        return await asyncio.gather(*map(read, requests))

    found = asyncio.run(read_all())
    assert found == [alone(service, request).tokens for request in requests]


def test_updates_show_what_is_drafted_to_those_who_watch(serve):
    service = serve(decode=DecodeConfig(threshold=1.0, sub_block_size=4, policy="threshold"))
    request = Request(prompt=make_prompts((9,))[0], max_new_tokens=30)
    answer, unwatched = service.submit(request, is_watched=True), service.submit(request)
    updates, tokens = list(answer), []
    for update in updates:
        tokens += update.tokens
        end = len(request.prompt) + len(tokens) + len(update.draft)
        assert not update.draft or end % 8 == 0 or end == 39
    assert any(None in update.draft for update in updates) and tokens == answer.completion.tokens
    assert all(update.draft is None and update.tokens for update in unwatched)
    assert list(answer)[0].tokens == tokens  # a reader that comes later gets all at once


def test_a_cancelled_answer_ends_and_frees_its_slot(serve):
    service = serve(batch_size=1, max_tokens=400)
    long = [service.submit(Request(prompt=[number], max_new_tokens=390)) for number in range(3)]
    iterator = iter(long[0])
    next(iterator)
    long[2].cancel()  # which waits
    long[0].cancel()
    with pytest.raises(RuntimeError, match="was cancelled"):
        long[2].result()
    next(iter(long[1]))  # has the slot now
    long[1].cancel()
    assert list(iterator) == [] or long[0].is_ended
    with pytest.raises(RuntimeError, match="was cancelled"):
        long[1].result()
    assert long[0].is_cancelled and long[0].completion is None and len(long[0].tokens) < 390
    request = Request(prompt=[5], max_new_tokens=9)
    assert service.submit(request).result().tokens == alone(service, request).tokens
    assert service.counts() == dict(waiting=0, running=0, ended=4, engines=1)


def test_a_full_queue_refuses_and_takes_requests_again_later(serve):
    service = serve(batch_size=1, max_waiting=2, max_tokens=400)
    first = service.submit(Request(prompt=[1], max_new_tokens=390))
    next(iter(first))
    others = [service.submit(Request(prompt=[number], max_new_tokens=3)) for number in (2, 3)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        service.submit(Request(prompt=[4], max_new_tokens=3))
    first.cancel()
    assert all(other.result() for other in others)
    assert service.submit(Request(prompt=[4], max_new_tokens=3)).result()


def test_an_error_ends_the_answers_of_its_engine_and_no_others(serve, monkeypatch):
    service, call = serve(batch_size=2), PlainForward.__call__
    good = [service.submit(request, mode="ar") for request in make_requests(4, seed=1)]

    def fail(forward, tokens, *arguments, **options):
        if (tokens == 77).any():
            raise RuntimeError("the device is on fire")
        return call(forward, tokens, *arguments, **options)

    monkeypatch.setattr(PlainForward, "__call__", fail)
    bad = service.submit(Request(prompt=[77], max_new_tokens=9))
    with pytest.raises(RuntimeError, match="RuntimeError: the device is on fire"):
        bad.result()
    for answer in good:
        assert answer.result().tokens == alone(service, answer.request, mode="ar").tokens
    again = Request(prompt=[78], max_new_tokens=9)
    assert service.submit(again).result().tokens == alone(service, again).tokens


def test_memory_that_does_not_suffice_fails_the_request_and_not_the_thread(serve, monkeypatch):
    service = serve(batch_size=1)

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(PlainForward, "__call__", fail)
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            service.submit(Request(prompt=[1], max_new_tokens=9)).result()
    assert service.submit(Request(prompt=[1], max_new_tokens=9)).result()
    small = serve(cache_bytes=1000)
    with pytest.raises(RuntimeError, match="a request of this session may grow to 100 tokens.*raise cache_bytes"):
        small.submit(Request(prompt=[1], max_new_tokens=9)).result()


def test_memory_that_runs_out_begins_answers_anew_and_takes_nothing_back(serve, monkeypatch, capsys):
    service, call, calls = serve(batch_size=4), PlainForward.__call__, []

    def fail_twice(forward, tokens, *arguments, **options):
        calls.append(len(tokens))
        if len(calls) in (25, 70):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(forward, tokens, *arguments, **options)

    monkeypatch.setattr(PlainForward, "__call__", fail_twice)
    answers = [service.submit(request) for request in make_requests(12, seed=2)]
    for answer in answers:
        tokens = [token for update in answer for token in update.tokens]
        assert tokens == answer.completion.tokens
    monkeypatch.undo()
    assert all(answer.tokens == alone(service, answer.request).tokens for answer in answers)
    assert capsys.readouterr().out.count("out of memory: going on with") == 2


def ended(answers):
    """Wait at most five seconds; return why each answer ended."""
    deadline = time.monotonic() + 5
    while not all(answer.is_ended for answer in answers) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert all(answer.is_ended for answer in answers)
    return [answer.error for answer in answers]


def test_an_engine_that_cannot_be_made_fails_its_answers_and_not_the_thread(serve, monkeypatch):
    service, request = serve(), Request(prompt=[1], max_new_tokens=9)

    def fail(*arguments, **options):
        raise TypeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(service_module, "Engine", fail)
        assert ended([service.submit(request) for _ in range(2)]) == ["TypeError: no such kernel"] * 2
    assert service.submit(request).result().tokens == alone(service, request).tokens


def test_an_answer_that_cannot_become_text_fails_its_engine_and_not_the_thread(serve, monkeypatch):
    service, request = serve(), Request(prompt=[1], max_new_tokens=9)

    def fail(*arguments):
        raise OverflowError("no such token")

    with monkeypatch.context() as patch:
        patch.setattr(Row, "completion", fail)
        assert ended([service.submit(request)]) == ["OverflowError: no such token"]
    assert service.submit(request).result().tokens == alone(service, request).tokens


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # which this is about
def test_a_thread_that_ends_leaves_no_answer_without_an_end(serve, monkeypatch):
    service = serve(max_engines=1, batch_size=1)
    service.submit(Request(prompt=[1], max_new_tokens=3)).result()

    def fail(lane):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Lane, "close", fail)
    answers = [service.submit(Request(prompt=[1], max_new_tokens=9), mode="ar") for _ in range(3)]
    answers[2].cancel()
    assert all("the device is gone" in error or "cancelled" in error for error in ended(answers))
    assert not service.is_alive


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (dict(prompt=[300], max_new_tokens=1), {}, "token ids of a prompt must be 0 to 271, got 300"),
        (dict(prompt=[-1], max_new_tokens=1), {}, "must be 0 to 271, got -1"),
        (dict(prompt=[MASK], max_new_tokens=1), {}, "holds the mask token"),
        (dict(prompt=[1] * 90, max_new_tokens=11), {}, r"got 90 \+ 11; ask for at most 10 new ones"),
        (dict(prompt=[1] * 120, max_new_tokens=1), {}, "shorten the prompt by 21 or more"),
        (dict(prompt=[1], max_new_tokens=1, parameter=1.5), {}, "threshold must be"),
        (dict(prompt=[1], max_new_tokens=1, parameter=0.5), {"mode": "ar"}, "no effect token by token"),
        (dict(prompt=[1], max_new_tokens=1), {"mode": "both"}, "mode must be diffusion or ar, got 'both'"),
        (dict(prompt=[1], max_new_tokens=1), {"decode": DecodeConfig(sub_block_size=5)}, "must divide the block size"),
        (dict(prompt=[1], max_new_tokens=1), {"reuse": ReuseConfig(reuse_k=2, subset="9")}, "subset"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(serve, request_, options, message):
    service = serve()
    with pytest.raises(ValueError, match=message):
        service.submit(Request(**request_), **options)
    assert service.counts()["ended"] == 0


def test_a_closed_service_fails_what_is_left_and_refuses_more(serve):
    service = serve(batch_size=1, max_tokens=400)
    answers = [service.submit(Request(prompt=[number], max_new_tokens=390)) for number in range(3)]
    next(iter(answers[0]))
    service.close()
    for answer in answers:
        with pytest.raises(RuntimeError, match="the service is closed"):
            answer.result()
    with pytest.raises(RuntimeError, match="the service is closed"):
        service.submit(Request(prompt=[1], max_new_tokens=1))
    service.close()
    assert not any(thread.name == "decoding" and thread.is_alive() for thread in threading.enumerate())


def test_a_request_for_a_new_engine_is_not_starved_by_busy_ones(serve):
    service, stop = serve(batch_size=1, max_engines=1, max_tokens=60), threading.Event()

    def keep_busy():
        while not stop.is_set():
            service.submit(Request(prompt=[1], max_new_tokens=30))
            time.sleep(0.002)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        time.sleep(0.05)
        before = service.counts()
        answer = service.submit(Request(prompt=[2], max_new_tokens=5), mode="ar")
        answer.result()
        assert before["waiting"] > 0 and service.counts()["waiting"] > 0
    finally:
        stop.set()
        thread.join()
