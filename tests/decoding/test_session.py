"""An open session: requests come and go between rounds, and what a slot keeps from the last one changes nothing."""

import random

import pytest
import torch

from decoding.test_engine import MASK, make_model, make_prompts
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.session import FreeSlots, shared_tokens

BLOCKS = dict(threshold=0.4, sub_block_size=4)
WAYS = {  # name -> mode, context, reuse, decoding
    "diffusion": ("diffusion", "block", {}, BLOCKS),
    "causal": ("diffusion", "causal", {}, BLOCKS),
    "fused": ("diffusion", "block", {}, BLOCKS | {"fuse_append": True}),
    "reuse": ("diffusion", "block", {"reuse_k": 2, "subset": "middle", "reuse_mode": "delta"}, BLOCKS),
    "trimmed": ("diffusion", "block", {"active_rows": "needed"}, BLOCKS),
    "ar": ("ar", "block", {}, {}),
    "verified": ("diffusion", "causal", {}, {"policy": "verified", "draft_length": 3}),
}


def make_engine(tokenizer, way="diffusion", batch_size=3, free_rows=None, model=None):
    mode, context, reuse, decode = WAYS[way]
    return Engine(
        model or make_model(context=context),
        tokenizer,
        mode=mode,
        reuse=ReuseConfig(**reuse),
        decode=DecodeConfig(**decode),
        batch_size=batch_size,
        free_rows=free_rows,
    )


def alone(engine, request):
    """The answer of a fresh engine of the same settings."""
    fresh = Engine(
        engine.model, engine.tokenizer, mode=engine.mode, decode=engine.decode, reuse=engine.reuse, batch_size=1
    )
    return next(fresh.run([request])).tokens


def finish(session):
    """Run until nobody waits; return the rows that ended."""
    ended = []
    while session.has_work:
        ended += [row for row in session.round() if row.is_finished]
    return ended


@pytest.fixture(params=[0, 1], ids=["follows", "lags"])
def lag(request, monkeypatch):
    """Rounds by which the host follows late, as on a GPU."""
    make_room = Engine._make_room

    def make_room_with_lag(engine, *arguments, **options):
        make_room(engine, *arguments, **options)
        engine._lag = request.param

    monkeypatch.setattr(Engine, "_make_room", make_room_with_lag)


@pytest.mark.parametrize("way", WAYS)
def test_turns_of_a_conversation_keep_what_was_read_and_answer_as_without(byte_tokenizer, way, lag):
    engine = make_engine(byte_tokenizer, way, free_rows=1000 if way == "diffusion" else None)
    histories = make_prompts((5, 16, 33))
    with engine.open(150) as session:
        for turn in range(3):
            requests = [Request(prompt=history, max_new_tokens=13 + turn) for history in histories]
            rows = [session.submit(request) for request in requests]
            assert len(finish(session)) == len(rows)
            for number, (row, request) in enumerate(zip(rows, requests, strict=True)):
                assert row.tokens == alone(engine, request)
                assert row.cached_tokens % 8 == 0 or way in ("ar", "verified")
                histories[number] = request.prompt + row.tokens + make_prompts((7,), seed=turn)[0]
        assert sum(row.cached_tokens for row in rows) > 64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_new_tokens", [18, 20])  # the first ends with a block, which is not clean for all that
def test_the_whole_history_but_its_last_block_is_kept(byte_tokenizer, way, max_new_tokens):
    engine = make_engine(byte_tokenizer, way, batch_size=1)
    with engine.open(120) as session:
        first = session.submit(Request(prompt=make_prompts((30,))[0], max_new_tokens=max_new_tokens))
        finish(session)
        assert len(first.tokens) == max_new_tokens
        history = first.request.prompt + first.tokens
        longer = Request(prompt=history + [1, 2, 3], max_new_tokens=20)
        row = session.submit(longer)
        finish(session)
        assert row.tokens == alone(engine, longer)
        assert row.cached_tokens == (len(history) - 1) // 8 * 8
        assert row.counts[0] <= 1  # prefill passes: what is not kept fits into one
        again = session.submit(longer)  # of a prompt that is there as a whole, the end is read for the next token
        finish(session)
        assert again.tokens == row.tokens and again.cached_tokens >= len(longer.prompt) - 8


@pytest.mark.parametrize("way", ["diffusion", "causal", "ar", "verified"])
def test_of_a_prompt_that_was_half_read_that_half_is_kept(byte_tokenizer, way, lag):
    engine = make_engine(byte_tokenizer, way, batch_size=1)
    request = Request(prompt=make_prompts((300,))[0], max_new_tokens=12)
    with engine.open(320) as session:
        dropped = session.submit(request)
        session.round()
        session.drop(dropped)
        row = session.submit(request)
        finish(session)
    assert row.cached_tokens == 256 and row.tokens == alone(engine, request)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_dropped_anywhere_leave_nothing_wrong_behind(byte_tokenizer, way, lag):
    engine, chance = make_engine(byte_tokenizer, way), random.Random(0)
    stems = make_prompts((8, 24, 40))
    with engine.open(80) as session:
        kept, dropped = [], []
        for number in range(25):
            stem = chance.choice(stems)
            prompt = stem[: chance.randint(1, len(stem))] + make_prompts((chance.randint(0, 5),), number)[0]
            row = session.submit(Request(prompt=prompt, max_new_tokens=chance.randint(1, 24)))
            for _ in range(chance.randint(0, 4)):
                session.round()
            kept.append(row)
            if chance.random() < 0.5 and session.active:
                row = chance.choice(session.active)
                session.drop(row)
                dropped.append((row, len(row.tokens)))
                kept.remove(row)
        finish(session)
        assert all(len(row.tokens) == length for row, length in dropped)
        assert len(dropped) > 5 and len(kept) > 5 and sum(row.cached_tokens for row in kept) > 24
        for row in kept:
            assert row.is_finished and row.tokens == alone(engine, row.request)


def test_a_dropped_row_frees_its_slot_at_once(byte_tokenizer):
    engine = make_engine(byte_tokenizer, batch_size=1)
    with engine.open(400) as session:
        first, second = (session.submit(Request(prompt=[number], max_new_tokens=300)) for number in (1, 2))
        session.round()
        assert session.active == [first]
        session.drop(first)
        session.round()
        assert session.active == [second] and first.is_finished and not session.waiting
        session.drop(first)  # once more does nothing
        third = session.submit(Request(prompt=[3], max_new_tokens=1))
        session.drop(third)
        assert not session.waiting and not third.tokens


@pytest.mark.parametrize("way", ["diffusion", "causal", "reuse", "verified"])
def test_what_is_drafted_stands_behind_the_final_tokens_and_becomes_final_or_not(byte_tokenizer, way, lag):
    engine = make_engine(byte_tokenizer, way, model=make_model(context=WAYS[way][1], block_size=16))
    request = Request(prompt=make_prompts((11,))[0], max_new_tokens=40)
    expected, kinds, seen = alone(engine, request), set(), 0
    with engine.open(120) as session:
        row, other = session.submit(request, is_watched=True), session.submit(request)
        while session.has_work:
            moved = session.round()
            assert row not in moved or len(row.tokens) + len(row.draft) <= 40 and not other.draft
            end = len(request.prompt) + len(row.tokens) + len(row.draft)
            assert way == "verified" or not row.draft or end % 16 == 0 or end == row.limit
            for token, final in zip(row.draft, expected[len(row.tokens) :], strict=False):
                kinds.add("masked" if token is None else "right" if token == final else "wrong")
            seen += bool(row.draft)
    assert row.tokens == other.tokens == expected and not row.draft
    assert seen > 3 and kinds == (
        {"wrong"} if way == "verified" else {"masked", "right"}
    )  # no draft of chance is right


def test_memory_that_runs_out_restarts_rows_in_place(byte_tokenizer, monkeypatch, capsys):
    engine = make_engine(byte_tokenizer, batch_size=4)
    call, calls = PlainForward.__call__, []

    def fail_once(forward, tokens, *arguments, **options):
        calls.append(len(tokens))
        if len(calls) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(forward, tokens, *arguments, **options)

    monkeypatch.setattr(PlainForward, "__call__", fail_once)
    with engine.open(60) as session:
        rows = [session.submit(Request(prompt=prompt, max_new_tokens=20)) for prompt in make_prompts((5, 9, 21, 30))]
        finish(session)
    assert engine.batch_size == 2 and "out of memory" in capsys.readouterr().out
    assert all(row.tokens == alone(engine, row.request) for row in rows)


def test_a_session_refuses_what_it_cannot_answer_and_gives_the_engine_back(byte_tokenizer):
    engine = make_engine(byte_tokenizer)
    with engine.open(40) as session:
        with pytest.raises(ValueError, match=r"at most 40 tokens, prompt and answer, got 30 \+ 11"):
            session.submit(Request(prompt=[1] * 30, max_new_tokens=11))
        with pytest.raises(ValueError, match="holds the mask token"):
            session.submit(Request(prompt=[MASK], max_new_tokens=1))
        with pytest.raises(RuntimeError, match="in the middle of a run"):
            engine.open(40)
        session.submit(Request(prompt=[1], max_new_tokens=30))
        session.round()
    assert not session.has_work and not engine.is_busy
    request = Request(prompt=[1], max_new_tokens=39)
    assert next(engine.run([request])).tokens == alone(engine, request)
    engine.cache_bytes = 10
    engine.free()
    with engine.open(40) as session, pytest.raises(ValueError, match="a request of this session may grow to 40 tokens"):
        session.submit(request)
        session.round()


def test_the_slot_with_the_longest_beginning_is_taken_and_of_equals_the_oldest():
    free = FreeSlots(3, 4)
    assert [free.take([1] * 9)[0] for _ in range(3)] == [0, 1, 2]
    free.give(2, [1] * 8)
    free.give(0, [1] * 4 + [2] * 8)
    free.give(1, [3] * 4)
    assert free.take([1] * 4 + [2] * 7) == (0, 8)
    assert free.take([4] * 9) == (2, 0) and len(free) == 1
    assert free.take([3] * 9) == (1, 4)
    free.give(2, [])
    assert free.take([1] * 8) == (2, 0)  # what a slot held is forgotten when it is taken


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [([1] * 7, [1] * 7, 4), ([1] * 8, [1] * 9, 8), ([1, 1, 1, 2] * 2, [1, 1, 1, 2, 1, 1, 1, 3], 4), ([], [1], 0)],
)
def test_shared_tokens_are_whole_blocks(first, second, shared):
    assert shared_tokens(first, second, 4) == shared
