"""The engine against the plain decoders, in float32; and what it counts."""

import gc
import weakref
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from conftest import make_qwen

from fastdllm.decoding import engine as engine_module
from fastdllm.decoding.clock import PassClock
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.graphs import recorded_size
from fastdllm.decoding.reference import decode_autoregressive, decode_plain, decode_with_stale_keys
from fastdllm.decoding.reuse import LayerStore, ReuseConfig, layer_subset
from fastdllm.model import BlockDiffusionLM

MASK = 259
TIE = 1e-5


def make_model(block_size=8, context="block", seed=0, layers=4, **changes):
    # large random weights: peaked, varied predictions, so that thresholds and stop tokens matter
    qwen = make_qwen(seed, initializer_range=0.35, num_hidden_layers=layers, **changes)
    return BlockDiffusionLM(qwen, block_size=block_size, mask_token_id=MASK, context_attention=context)


def make_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


by_index = attrgetter("index")
LENGTHS = (1, 5, 7, 8, 9, 16, 21)  # below, at and above block multiples


def run(model, tokenizer, prompts, *, batch_size=4, max_new_tokens=30, mode="diffusion", reuse=None, **decode):
    engine = Engine(
        model, tokenizer, mode=mode, decode=DecodeConfig(**decode), reuse=reuse or ReuseConfig(), batch_size=batch_size
    )
    requests = [Request(prompt=prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    return sorted(engine.run(requests), key=lambda completion: completion.index), engine


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize(("threshold", "sub_block_size"), [(1.0, 4), (0.5, 4), (0.2, 8), (0.3, 2)])
def test_block_cache_equals_uncached(byte_tokenizer, context, threshold, sub_block_size):
    model, prompts = make_model(context=context), make_prompts(LENGTHS)
    options = dict(threshold=threshold, sub_block_size=sub_block_size)
    completions, engine = run(model, byte_tokenizer, prompts, use_block_cache=False, **options)
    for completion, prompt in zip(completions, prompts, strict=True):
        plain = decode_plain(model, prompt, max_new_tokens=30, stop_ids=engine.stop_ids, **options)
        assert completion.tokens == plain.tokens or plain.margins[0] < TIE
        assert completion.denoise_passes == plain.denoise_passes
        assert completion.append_passes == plain.append_passes


@pytest.mark.parametrize("reuse_k", [1, 2, 3])
@pytest.mark.parametrize("subset", ["first", "middle", "last", "1,2"])
@pytest.mark.parametrize("threshold", [1.0, 0.4])
def test_sub_block_cache_and_output_reuse_equal_explicit_stale_keys(byte_tokenizer, reuse_k, subset, threshold):
    model, prompts = make_model(), make_prompts(LENGTHS)
    options = dict(threshold=threshold, sub_block_size=4)
    reuse = ReuseConfig(reuse_k=reuse_k, subset=subset)
    completions, engine = run(model, byte_tokenizer, prompts, reuse=reuse, **options)
    for completion, prompt in zip(completions, prompts, strict=True):
        plain = decode_with_stale_keys(
            model, prompt, max_new_tokens=30, stop_ids=engine.stop_ids, reuse_k=reuse_k, **options
        )
        assert completion.tokens == plain.tokens or plain.margins[0] < TIE
        assert completion.denoise_passes == plain.denoise_passes
        assert completion.full_passes == plain.full_passes < plain.denoise_passes


@pytest.mark.parametrize("options", [{}, {"use_block_cache": False}, {"temperature": 0.8, "top_p": 0.9}])
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_batch_equals_batches_of_one(byte_tokenizer, options, mode):
    model, prompts = make_model(), make_prompts(LENGTHS)
    together, _ = run(
        model, byte_tokenizer, prompts, batch_size=5, mode=mode, threshold=0.4, sub_block_size=4, **options
    )
    for prompt, batched in zip(prompts, together, strict=True):
        (alone,), _ = run(model, byte_tokenizer, [prompt], mode=mode, threshold=0.4, sub_block_size=4, **options)
        assert batched.tokens == alone.tokens
        assert (batched.denoise_passes, batched.layers_run) == (alone.denoise_passes, alone.layers_run)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_ar_mode_equals_whole_sequence_passes(byte_tokenizer, context):
    model, prompts = make_model(context=context), make_prompts(LENGTHS)
    completions, engine = run(model, byte_tokenizer, prompts, mode="ar")
    for completion, prompt in zip(completions, prompts, strict=True):
        assert completion.tokens == decode_autoregressive(model, prompt, max_new_tokens=30, stop_ids=engine.stop_ids)
        assert completion.denoise_passes == completion.counted_tokens
        assert completion.prefill_passes == (len(prompt) > 1)


@pytest.mark.parametrize("mode", ["output", "delta"])
def test_reuse_runs_fewer_layers_and_counts_them(byte_tokenizer, mode):
    model, prompts = make_model(layers=7), make_prompts((9,))
    before = model.layer_calls
    (plain,), _ = run(model, byte_tokenizer, prompts, threshold=1.0, sub_block_size=4, max_new_tokens=16)
    assert plain.layers_run == model.layer_calls - before
    passes = plain.denoise_passes + plain.append_passes + plain.prefill_passes
    assert plain.layers_run == 7 * passes
    reuse = ReuseConfig(reuse_k=2, subset="middle", reuse_mode=mode)
    before = model.layer_calls
    (reused,), _ = run(model, byte_tokenizer, prompts, threshold=1.0, sub_block_size=4, max_new_tokens=16, reuse=reuse)
    assert reused.layers_run == model.layer_calls - before
    assert reused.layers_run < 7 * (reused.denoise_passes + reused.append_passes + reused.prefill_passes)


def test_delta_reuse_depends_on_the_subset_and_output_reuse_does_not(byte_tokenizer):
    model, prompts = make_model(layers=7), make_prompts((9, 12, 20, 25, 3))

    def answers(subset, mode):
        reuse = ReuseConfig(reuse_k=2, subset=subset, reuse_mode=mode)
        return [c.tokens for c in run(model, byte_tokenizer, prompts, threshold=1.0, sub_block_size=4, reuse=reuse)[0]]

    assert answers("first", "output") == answers("middle", "output") == answers("last", "output")
    assert answers("first", "delta") != answers("last", "delta")


def test_stop_token_limit_and_stop_string_end_an_answer(byte_tokenizer):
    model = make_model()
    prompts = make_prompts(LENGTHS)
    completions, engine = run(model, byte_tokenizer, prompts, mode="ar", max_new_tokens=12)
    assert all(c.counted_tokens == 12 or c.tokens[-1] in engine.stop_ids for c in completions)
    assert all(not set(c.tokens[:-1]) & engine.stop_ids for c in completions)
    for mode in ("ar", "diffusion"):
        (whole,), _ = run(model, byte_tokenizer, prompts[-1:], mode=mode, sub_block_size=4, max_new_tokens=28)
        stop = whole.text[2:4]
        request = Request(prompt=prompts[-1], max_new_tokens=28, stop_strings=(stop,))
        decode = DecodeConfig(sub_block_size=4)
        (cut,) = Engine(model, byte_tokenizer, mode=mode, decode=decode).run([request])
        assert cut.text == whole.text.split(stop, 1)[0]
        assert cut.counted_tokens < whole.counted_tokens


def test_a_delta_is_what_a_layer_added_and_comes_back_for_the_same_places():
    model = make_model()
    store = LayerStore(model, ReuseConfig(reuse_k=2, subset="2", reuse_mode="delta"), num_slots=3)
    slots = torch.tensor([2, 0])
    width = model.qwen.config.hidden_size
    before, attention, mlp = torch.randn(3, 2, 8, width)
    store.select(slots, torch.arange(8).expand(2, -1), is_reused=False, is_full=True)
    after = store.run(2, before, lambda hidden: attention, lambda hidden: mlp)
    torch.testing.assert_close(after, before + attention + mlp)
    fresh = torch.randn(2, 4, width)
    store.select(slots, torch.tensor([[4, 5, 6, 7], [0, 1, 2, 3]]), is_reused=True, is_full=False)
    delta = after - before
    expected = fresh + torch.stack([delta[0, 4:], delta[1, :4]])
    torch.testing.assert_close(store.run(2, fresh, None, None), expected)


def test_bad_settings_are_refused(byte_tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="must divide the block size"):
        Engine(model, byte_tokenizer, decode=DecodeConfig(sub_block_size=3))
    for wrong in (dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=float("nan"))):
        with pytest.raises(ValueError, match="temperature must be 0 or more and finite, .* got .*(nan|inf)"):
            DecodeConfig(**wrong)
    with pytest.raises(ValueError, match="use_block_cache"):
        Engine(model, byte_tokenizer, decode=DecodeConfig(use_block_cache=False), reuse=ReuseConfig(reuse_k=2))
    with pytest.raises(ValueError, match="reuse_k"):
        Engine(model, byte_tokenizer, mode="ar", reuse=ReuseConfig(reuse_k=2))
    with pytest.raises(ValueError, match="at least one token"):
        Request(prompt=[], max_new_tokens=3)
    with pytest.raises(ValueError, match="threshold"):
        DecodeConfig(threshold=0.0)
    for options in ({"mode": "ar"}, {"reuse": ReuseConfig(reuse_k=2)}):
        with pytest.raises(ValueError, match="fuse_append needs diffusion decoding without reuse"):
            Engine(model, byte_tokenizer, decode=DecodeConfig(fuse_append=True), **options)
    with pytest.raises(ValueError, match="parameter of request 0 has no effect token by token"):
        next(Engine(model, byte_tokenizer, mode="ar").run([Request(prompt=[1], max_new_tokens=3, parameter=0.5)]))
    with pytest.raises(ValueError, match="is_graphed needs a model on a GPU"):
        Engine(model, byte_tokenizer, is_graphed=True)
    with pytest.raises(ValueError, match="holds the mask token"):
        next(Engine(model, byte_tokenizer).run([Request(prompt=[1, MASK], max_new_tokens=3)]))


def answers(model, tokenizer, requests, batch_size=3, **options):
    engine = Engine(
        model, tokenizer, decode=DecodeConfig(threshold=0.4, sub_block_size=4), batch_size=batch_size, **options
    )
    return sorted(engine.run(requests), key=lambda completion: completion.index), engine


def make_requests(prompts, **options):
    return [Request(prompt=prompt, max_new_tokens=30, **options) for prompt in prompts]


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_passes_over_whole_blocks_and_a_host_that_lags_behind_change_nothing(
    byte_tokenizer, monkeypatch, context, lag, mode
):
    # the answers of 10 + 30 tokens end with the slot, and the host that lags behind runs one pass more on it
    model, requests = make_model(context=context), make_requests(make_prompts((1, 5, 8, 10, 9, 10)))
    expected, _ = answers(model, byte_tokenizer, requests, mode=mode)
    set_up = Engine._set_up

    def set_up_with_lag(engine, waiting):
        set_up(engine, waiting)
        engine._lag = lag

    monkeypatch.setattr(Engine, "_set_up", set_up_with_lag)
    universal, _ = answers(model, byte_tokenizer, requests, mode=mode, free_rows=1000)
    assert [replace(c, rows_run=0) for c in universal] == [replace(c, rows_run=0) for c in expected]
    assert mode == "ar" or universal[0].rows_run > expected[0].rows_run


def test_passes_that_are_merged_where_rows_are_free_change_nothing(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "BLIND_ROWS", 0)
    model, requests = make_model(), make_requests(make_prompts(LENGTHS))
    expected, _ = answers(model, byte_tokenizer, requests)
    merged, _ = answers(model, byte_tokenizer, requests, free_rows=1000)
    always, _ = answers(model, byte_tokenizer, requests[:1], free_rows=1000)
    assert [replace(c, rows_run=0) for c in merged] == [replace(c, rows_run=0) for c in expected]
    assert always[0].rows_run == expected[0].rows_run < merged[0].rows_run  # one slot never needs both passes


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"use_block_cache": False}])
@pytest.mark.parametrize("free_rows", [0, 1000])
def test_an_append_fused_with_the_next_step_gives_the_same_tokens_in_fewer_passes(
    byte_tokenizer, context, options, free_rows
):
    model, prompts = make_model(context=context), make_prompts(LENGTHS)
    options = dict(threshold=0.6, sub_block_size=4, **options)
    plain, _ = run(model, byte_tokenizer, prompts, **options)
    requests = make_requests(prompts)
    engine = Engine(
        model, byte_tokenizer, decode=DecodeConfig(fuse_append=True, **options), batch_size=3, free_rows=free_rows
    )
    calls = model.layer_calls
    fused = sorted(engine.run(requests), key=lambda completion: completion.index)
    for ours, expected, prompt in zip(fused, plain, prompts, strict=True):
        assert ours.tokens == expected.tokens and ours.append_passes == expected.append_passes
        # an answer that ends with the append's own token, a block's first, leaves the step behind it unused
        is_unused = (len(prompt) + len(ours.tokens)) % model.block_size == 1
        assert ours.denoise_passes - expected.denoise_passes in ((0, 1) if is_unused else (0,))
    saved = sum(expected.layers_run - ours.layers_run for ours, expected in zip(fused, plain, strict=True))
    assert saved > 0 and saved % model.num_layers == 0 and model.layer_calls > calls


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("policy", ["threshold", "margin", "entropy"])
def test_the_fused_forward_pass_gives_the_same_answers(byte_tokenizer, mode, policy):
    model, requests = make_model(), make_requests(make_prompts(LENGTHS))
    decode = DecodeConfig(policy=policy, sub_block_size=4)
    plain, fused = (
        sorted(
            Engine(model, byte_tokenizer, mode=mode, decode=decode, batch_size=3, is_fused=way).run(requests), key=by
        )
        for way in (False, True)
    )
    assert plain == fused


def by(completion):
    return completion.index


def test_long_prompts_are_read_in_chunks(byte_tokenizer, monkeypatch):
    model, requests = make_model(), make_requests(make_prompts((64, 30, 90, 7)))
    whole, _ = answers(model, byte_tokenizer, requests)
    monkeypatch.setattr("fastdllm.decoding.engine.PREFILL_WIDTH", 16)
    chunked, _ = answers(model, byte_tokenizer, requests)
    assert [c.tokens for c in chunked] == [c.tokens for c in whole]
    assert [c.prefill_passes for c in chunked] == [4, 2, 6, 0]


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_common_prefix_is_read_once(byte_tokenizer, mode):
    model, (prefix, *rest) = make_model(), make_prompts((24, 1, 5, 8, 40))
    requests = make_requests([prefix + tail for tail in rest])
    shared, _ = answers(model, byte_tokenizer, requests, mode=mode)
    for completion, request in zip(shared, requests, strict=True):
        (alone,), _ = answers(model, byte_tokenizer, [request], mode=mode)
        assert completion.tokens == alone.tokens
        assert completion.layers_run <= alone.layers_run
    assert sum(c.prefill_passes for c in shared) < len(rest) or mode == "ar"
    requests = make_requests([prefix, prefix + rest[0]])  # the first prompt is the prefix and nothing else
    for completion, request in zip(answers(model, byte_tokenizer, requests, mode=mode)[0], requests, strict=True):
        assert completion.tokens == answers(model, byte_tokenizer, [request], mode=mode)[0][0].tokens


def test_out_of_memory_halves_the_batch_and_loses_nothing(byte_tokenizer, monkeypatch, capsys):
    model, requests = make_model(), make_requests(make_prompts(LENGTHS))
    expected, _ = answers(model, byte_tokenizer, requests, batch_size=4)
    call, calls = PlainForward.__call__, []

    def fail_twice(forward, tokens, *arguments, **options):
        calls.append(len(tokens))
        if len(calls) in (30, 60):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(forward, tokens, *arguments, **options)

    monkeypatch.setattr(PlainForward, "__call__", fail_twice)
    ours, engine = answers(model, byte_tokenizer, requests, batch_size=4)
    assert [c.tokens for c in ours] == [c.tokens for c in expected] and [c.index for c in ours] == list(range(7))
    assert engine.batch_size == 1 and max(calls[60:]) == 1
    assert capsys.readouterr().out.count("out of memory: going on with") == 2


def test_memory_limits_the_slots_and_a_request_that_cannot_fit_is_refused(byte_tokenizer):
    model, requests = make_model(), make_requests(make_prompts((9, 9, 9)))
    per_place = 2 * 4 * model.qwen.config.num_key_value_heads * 8 * 4  # keys and values, layers, heads, width, bytes
    ours, engine = answers(model, byte_tokenizer, requests, cache_bytes=3 * 41 * per_place)
    assert engine.num_slots == 2 and len(ours) == 3
    with pytest.raises(ValueError, match="request 0 may grow to 39 tokens.*which 24 tokens"):
        answers(model, byte_tokenizer, requests[:1], cache_bytes=2 * 30 * per_place)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_an_engine_keeps_its_slots_for_the_next_run_and_changes_nothing_by_it(byte_tokenizer, mode):
    model, prompts = make_model(), make_prompts(LENGTHS)
    requests = [Request(prompt=prompt, max_new_tokens=30) for prompt in prompts]
    decode = DecodeConfig(threshold=0.4, sub_block_size=4)
    kept, states = Engine(model, byte_tokenizer, mode=mode, decode=decode, batch_size=3), []
    broken_off = kept.run(requests)
    next(broken_off)
    with pytest.raises(RuntimeError, match="in the middle of a run"):
        next(kept.run(requests))
    broken_off.close()
    for batch in (requests[::-1], requests[:2], requests):
        fresh = Engine(model, byte_tokenizer, mode=mode, decode=decode, batch_size=3)
        ours, expected = (sorted(engine.run(batch), key=by_index) for engine in (kept, fresh))
        assert ours == expected
        states.append(kept.state)
    assert states[0] is states[1] is states[2]
    list(kept.run([Request(prompt=prompts[-1], max_new_tokens=60)]))  # too long for the slots that are there
    assert kept.state is not states[0]


def test_each_request_may_have_its_own_threshold(byte_tokenizer):
    model, prompts = make_model(), make_prompts(LENGTHS)
    requests = [Request(prompt=p, max_new_tokens=30, parameter=0.2 + 0.1 * i) for i, p in enumerate(prompts)]
    together, _ = answers(model, byte_tokenizer, requests)
    for completion, request in zip(together, requests, strict=True):
        decode = DecodeConfig(threshold=request.parameter, sub_block_size=4)
        (alone,) = Engine(model, byte_tokenizer, decode=decode).run(make_requests([request.prompt]))
        assert completion.tokens == alone.tokens
    with pytest.raises(ValueError, match="threshold"):
        answers(model, byte_tokenizer, make_requests(prompts[:1], parameter=1.5))


def test_graphs_are_recorded_for_few_sizes():
    assert [recorded_size(n) for n in (0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 330)] == [
        *(0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 384)
    ]


def test_subsets_are_the_documented_layers():
    assert layer_subset(28, "first") == tuple(range(1, 13))
    assert layer_subset(28, "middle") == tuple(range(8, 20))
    assert layer_subset(28, "last") == tuple(range(16, 28))
    assert layer_subset(8, "3,1,3") == (1, 3)
    for wrong, message in (("frist", "must be first"), ("7,8", "0 to 7")):
        with pytest.raises(ValueError, match=message):
            layer_subset(8, wrong)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("kept", [(0, 2, 3), (2,)])
def test_skipped_requests_change_no_other_answer_and_no_count(byte_tokenizer, mode, kept):
    model, (prefix, *rest) = make_model(), make_prompts((24, 1, 5, 8, 40))
    requests = make_requests([prefix + tail for tail in rest])
    expected, engine = answers(model, byte_tokenizer, requests, mode=mode)
    skip = set(range(4)) - set(kept)
    assert sorted(engine.run(requests, skip), key=by_index) == [expected[index] for index in kept]
    assert sorted(engine.run(requests), key=by_index) == expected  # skipped once, not for ever


def test_decode_seconds_leave_out_the_prefill_that_has_ended_by_now(byte_tokenizer):
    class Event:
        def __init__(self, has_ended):
            self.has_ended = has_ended

        def query(self):
            return self.has_ended

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    engine = Engine(make_model(), byte_tokenizer)
    engine.seconds = 1.0
    engine.prefill_clock._running = [(Event(True), Event(True)), (Event(True), Event(False))]
    assert engine.decode_seconds == engine.decode_seconds == 0.75
    engine.prefill_clock._running[0][1].has_ended = True
    assert engine.decode_seconds == 0.5


def test_a_clock_that_nobody_reads_keeps_no_events_of_passes_that_have_ended(monkeypatch):
    kept = weakref.WeakSet()

    class Event:
        def __init__(self, enable_timing):
            kept.add(self)

        def record(self):
            pass

        def query(self):
            return True

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = PassClock(torch.device("cuda"))
    for _ in range(100):
        clock.run(lambda: None)
    gc.collect()
    assert len(kept) <= 2 and clock.read() == 25.0
