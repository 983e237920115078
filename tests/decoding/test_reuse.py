"""Reuse: what it leaves out, what it counts, and that nothing kept outlives its block."""

import pytest
import torch

from decoding.test_engine import LENGTHS, TIE, make_model, make_prompts, run
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.reference import decode_with_stale_keys
from fastdllm.decoding.reuse import GatedStore, ReuseConfig, layer_subset, needed_rows, row_bucket
from fastdllm.decoding.state import Phase
from fastdllm.decoding.steps import Steps

MODES = ("output", "output_by_layer", "delta", "attn")
SUBSETS = ("first", "middle", "last", "1,2")
OPTIONS = dict(threshold=0.4, sub_block_size=4)


def reusing(mode="delta", subset="middle", reuse_k=2):
    return ReuseConfig(reuse_k=reuse_k, subset=subset, reuse_mode=mode)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("reuse_k", [2, 3])
def test_output_equals_leaving_out_the_layers(byte_tokenizer, subset, reuse_k):
    model, prompts = make_model(), make_prompts(LENGTHS)
    short, _ = run(model, byte_tokenizer, prompts, reuse=reusing("output", subset, reuse_k), **OPTIONS)
    slow, _ = run(model, byte_tokenizer, prompts, reuse=reusing("output_by_layer", subset, reuse_k), **OPTIONS)
    for one, other in zip(short, slow, strict=True):
        assert one.tokens == other.tokens
        assert one.denoise_passes == other.denoise_passes
        assert one.layers_run < other.layers_run


@pytest.mark.parametrize("mode", MODES)
def test_reuse_k_1_equals_no_reuse_bit_for_bit(byte_tokenizer, mode):
    model, prompts = make_model(), make_prompts(LENGTHS)
    (plain, _), (reused, _) = (
        run(model, byte_tokenizer, prompts, reuse=reuse, **OPTIONS) for reuse in (None, reusing(mode, "last", 1))
    )
    assert plain == reused


class Calls:
    """Counts the calls of every layer's attention and MLP."""

    def __init__(self, model):
        self.attention, self.mlp = [0] * model.num_layers, [0] * model.num_layers
        for index, layer in enumerate(model.qwen.model.layers):
            layer.self_attn.register_forward_hook(lambda *_, index=index: self.add(self.attention, index))
            layer.mlp.register_forward_hook(lambda *_, index=index: self.add(self.mlp, index))

    def add(self, counts, index):
        counts[index] += 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subset", ["first", "middle", "last"])
def test_a_reused_layer_does_no_work_and_the_others_all(byte_tokenizer, mode, subset):
    model = make_model(layers=7)
    calls, before = Calls(model), model.layer_calls
    options = dict(threshold=1.0, sub_block_size=4, max_new_tokens=16, reuse=reusing(mode, subset))
    (done,), _ = run(model, byte_tokenizer, make_prompts((9,)), **options)
    assert done.layers_run == model.layer_calls - before == sum(calls.mlp)
    passes = done.denoise_passes + done.append_passes + done.prefill_passes
    left_out = {layer for layer in range(7) if calls.attention[layer] < passes}
    assert left_out == set(range(7) if mode == "output" else layer_subset(7, subset))
    assert all((calls.mlp[layer] == passes) == (mode == "attn" or layer not in left_out) for layer in range(7))


def test_mode_output_runs_no_layer_in_halves_so_the_subset_changes_not_even_a_rounding(byte_tokenizer):
    engine = Engine(make_model(layers=7), byte_tokenizer, reuse=reusing("output"))
    list(engine.run([Request(prompt=make_prompts((9,))[0], max_new_tokens=4)]))
    assert engine.steps.is_output and engine.steps.store is None


class RecordedSteps(Steps):
    """Notes (kind of pass, layers run) of every pass of the last engine."""

    notes: list = []

    def _note(self, kind, run, *arguments, **options):
        before = self.model.layer_calls
        run(*arguments, **options)
        self.notes.append((kind, self.model.layer_calls - before))

    def prefill(self, slots, width):
        self._note("prefill", super().prefill, slots, width)

    def block(self, slots, **options):
        kind = "append" if (self.state.phase[slots] == Phase.APPEND).all() else "full"
        self._note(kind, super().block, slots, **options)

    def sub_block(self, slots, *, is_reused=False):
        self._note("reuse" if is_reused else "sub-block", super().sub_block, slots, is_reused=is_reused)


@pytest.mark.parametrize("mode", MODES)
def test_full_passes_and_appends_run_every_layer_and_reuse_steps_are_denoising_steps(byte_tokenizer, mode):
    model, RecordedSteps.notes = make_model(layers=7), []
    engine = Engine(model, byte_tokenizer, decode=DecodeConfig(threshold=1.0, sub_block_size=4), reuse=reusing(mode))
    engine.steps_class = RecordedSteps
    (done,) = engine.run([Request(prompt=make_prompts((9,))[0], max_new_tokens=30)])
    notes = RecordedSteps.notes
    layers = {kind: {count for other, count in notes if other == kind} for kind, _ in notes}
    assert layers["prefill"] == layers["append"] == layers["full"] == layers["sub-block"] == {7}
    assert layers["reuse"] == {{"output": 0, "attn": 7}.get(mode, 4)}
    kinds = [kind for kind, _ in notes]
    assert done.denoise_passes == sum(kind in ("full", "sub-block", "reuse") for kind in kinds)
    assert kinds.count("reuse") > 0


class PoisonedSteps(Steps):
    """Overwrites what is kept for a slot with NaN at the end of a block and when a request takes the slot."""

    is_always = False  # also before each reuse step, to see that poison kills

    def _poison(self, slots):
        stores = [self.kept] if self.is_output else list(self.store._stored.values())
        if isinstance(self.store, GatedStore):
            stores += [self.store._refreshed, self.store._change, self.store.waiting]
        for kept in stores:
            kept[slots] = torch.nan

    def begin(self, slots):
        self._poison(slots)
        super().begin(slots)

    def prefill(self, slots, width):
        self._slots = slots
        self._poison(slots)
        super().prefill(slots, width)

    def block(self, slots, **options):
        self._slots = slots
        super().block(slots, **options)

    def _begin_block(self, at, block, is_begun, token):
        self._poison(self._slots[is_begun])
        return super()._begin_block(at, block, is_begun, token)

    def sub_block(self, slots, *, is_reused=False):
        if is_reused and self.is_always:
            self._poison(slots)
        super().sub_block(slots, is_reused=is_reused)

    def rest(self, slots, *, is_reused):
        if is_reused and self.is_always:
            self._poison(slots)
        super().rest(slots, is_reused=is_reused)


class PoisonedReuse(PoisonedSteps):
    is_always = True


def adaptive(budget, mode="delta", subset="middle"):
    return ReuseConfig(schedule="adaptive", budget=budget, subset=subset, reuse_mode=mode)


NEEDED = ReuseConfig(active_rows="needed")
EACH_WAY = [*map(reusing, MODES), adaptive(0.6), adaptive(0.6, "attn"), NEEDED]


def way_name(reuse):
    return "active_rows" if reuse == NEEDED else f"{reuse.schedule}-{reuse.reuse_mode}"


@pytest.mark.parametrize("reuse", EACH_WAY[:-1], ids=way_name)
def test_nothing_kept_outlives_its_block_or_its_request(byte_tokenizer, reuse):
    model, prompts = make_model(), make_prompts(LENGTHS)
    answers = []
    for steps_class in (Steps, PoisonedSteps, PoisonedReuse):
        engine = Engine(model, byte_tokenizer, decode=DecodeConfig(**OPTIONS), reuse=reuse, batch_size=2)
        engine.steps_class = steps_class
        done = sorted(engine.run(Request(prompt=prompt, max_new_tokens=30) for prompt in prompts), key=by_index)
        answers.append([completion.tokens for completion in done])
    plain, poisoned, dead = answers
    assert plain == poisoned
    assert plain != dead


def by_index(completion):
    return completion.index


@pytest.mark.parametrize("reuse", EACH_WAY, ids=way_name)
def test_the_fused_forward_pass_reuses_in_the_same_way(byte_tokenizer, reuse):
    model, prompts = make_model(), make_prompts(LENGTHS)
    plain, fused = (
        sorted(
            Engine(
                model, byte_tokenizer, decode=DecodeConfig(**OPTIONS), reuse=reuse, batch_size=3, is_fused=is_fused
            ).run(Request(prompt=prompt, max_new_tokens=30) for prompt in prompts),
            key=by_index,
        )
        for is_fused in (False, True)
    )
    assert plain == fused


@pytest.mark.parametrize("reuse", EACH_WAY, ids=way_name)
def test_a_request_in_a_used_slot_answers_as_alone(byte_tokenizer, reuse):
    model, prompts = make_model(), make_prompts(LENGTHS)
    in_turn, _ = run(model, byte_tokenizer, prompts, batch_size=1, reuse=reuse, **OPTIONS)
    together, _ = run(model, byte_tokenizer, prompts, batch_size=5, reuse=reuse, **OPTIONS)
    for prompt, later, beside in zip(prompts, in_turn, together, strict=True):
        (alone,), _ = run(model, byte_tokenizer, [prompt], reuse=reuse, **OPTIONS)
        assert alone.tokens == later.tokens == beside.tokens
        assert alone.layers_run == later.layers_run == beside.layers_run


@pytest.mark.parametrize(
    ("mode", "subset"), [("delta", "first"), ("delta", "middle"), ("attn", "middle"), ("delta", "last")]
)
def test_adaptive_reuse_goes_from_none_to_every_step_with_its_budget(byte_tokenizer, mode, subset):
    model, prompts = make_model(layers=7), make_prompts((5, 8, 21))
    answers = {}
    for budget in (0.0, 0.6, float("inf")):
        before = model.layer_calls
        answers[budget], _ = run(
            model, byte_tokenizer, prompts, batch_size=1, reuse=adaptive(budget, mode, subset), **OPTIONS
        )
        assert sum(done.layers_run for done in answers[budget]) == model.layer_calls - before
    none, _ = run(model, byte_tokenizer, prompts, batch_size=1, **OPTIONS)
    every, _ = run(model, byte_tokenizer, prompts, batch_size=1, reuse=reusing(mode, subset, 10**6), **OPTIONS)
    assert answers[0.0] == none
    assert answers[float("inf")] == every
    assert answers[0.6] != none and answers[0.6] != every


def test_changes_add_up_until_a_refresh():
    model = make_model()
    store = GatedStore(model, adaptive(1.0, subset="2"), num_slots=3, sub_block_size=4)
    slots, places = torch.tensor([0, 1]), torch.arange(4).expand(2, -1)
    kept = torch.randn(2, 8, model.qwen.config.hidden_size)

    def refresh(slots, offsets, hidden):
        store.select(slots, offsets, is_reused=False, is_full=True)
        store.run(2, hidden, torch.zeros_like, torch.zeros_like)

    refresh(slots, torch.arange(8).expand(2, -1), kept)
    probe = kept[:, :4] * torch.tensor([1.45, 1.55])[:, None, None]  # relative changes of 0.45 and 0.55
    assert store.decide(slots, places, probe).tolist() == [True, True]
    assert store.decide(slots, places, probe).tolist() == [True, False]
    torch.testing.assert_close(store.waiting[:2], probe)
    refresh(slots[1:], places[1:], probe[1:])
    assert store.decide(slots, places, probe).tolist() == [False, True]
    assert store.decide(slots, places, probe).tolist() == [False, True]  # nothing moves since the refresh of slot 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(schedule="adaptive", reuse_mode="output"), "delta or attn"),
        (dict(schedule="adaptive", reuse_mode="output_by_layer"), "delta or attn"),
        (dict(schedule="adaptive", reuse_mode="delta", reuse_k=2), "reuse_k 2 does nothing"),
        (dict(schedule="adaptive", reuse_mode="delta", budget=-0.1), "0 or more"),
        (dict(budget=0.1, reuse_k=2), "does nothing in schedule fixed"),
        (dict(schedule="sometimes"), "must be one of fixed, adaptive"),
    ],
)
def test_settings_of_reuse_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReuseConfig(**options)


def test_adaptive_reuse_needs_a_layer_before_the_subset_and_the_sub_block_cache(byte_tokenizer):
    with pytest.raises(ValueError, match="layer 0"):
        Engine(make_model(), byte_tokenizer, reuse=adaptive(0.1, subset="0,1"))
    with pytest.raises(ValueError, match="use_block_cache"):
        Engine(make_model(), byte_tokenizer, decode=DecodeConfig(use_block_cache=False), reuse=adaptive(0.1))


@pytest.mark.parametrize(("threshold", "sub_block_size"), [(1.0, 4), (0.5, 8), (0.3, 4)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_active_rows_alone_equal_explicit_stale_keys(byte_tokenizer, threshold, sub_block_size, batch_size):
    model, prompts = make_model(), make_prompts(LENGTHS)
    options = dict(threshold=threshold, sub_block_size=sub_block_size)
    completions, engine = run(model, byte_tokenizer, prompts, batch_size=batch_size, reuse=NEEDED, **options)
    for completion, prompt in zip(completions, prompts, strict=True):
        plain = decode_with_stale_keys(
            model, prompt, max_new_tokens=30, stop_ids=engine.stop_ids, is_trimmed=True, **options
        )
        assert completion.tokens == plain.tokens or plain.margins[0] < TIE
        assert (completion.denoise_passes, completion.full_passes) == (plain.denoise_passes, plain.full_passes)


class AllRows(Steps):
    """Finds every row active."""

    def _active_rows(self, *arguments):
        return torch.ones_like(super()._active_rows(*arguments))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_with_all_rows_active_it_is_the_plain_step(byte_tokenizer, batch_size):
    model, prompts = make_model(), make_prompts(LENGTHS)
    decode, answers, caches = DecodeConfig(threshold=0.4, sub_block_size=8), [], []
    for reuse, steps_class in ((ReuseConfig(), Steps), (NEEDED, AllRows)):
        engine = Engine(model, byte_tokenizer, decode=decode, reuse=reuse, batch_size=batch_size)
        engine.steps_class = steps_class
        requests = [Request(prompt=prompt, max_new_tokens=30) for prompt in prompts]
        answers.append(sorted(engine.run(requests), key=by_index))
        caches.append(torch.cat([engine.cache.keys, engine.cache.values])[..., :-1, :])
    assert answers[0] == answers[1]
    if batch_size == 1:  # the same shapes, so the same bits
        assert torch.equal(*caches)
    else:
        torch.testing.assert_close(*caches)


def test_rows_are_counted_and_active_rows_are_fewer(byte_tokenizer):
    model, prompts = make_model(), make_prompts(LENGTHS)
    computed = []
    for layer in model.qwen.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: computed.append(output[..., 0].numel()))
    rows = {}
    for reuse in (None, NEEDED, reusing("output"), reusing("delta"), adaptive(0.6)):
        computed.clear()
        done, _ = run(model, byte_tokenizer, prompts, batch_size=1, threshold=1.0, sub_block_size=8, reuse=reuse)
        rows[reuse] = sum(completion.rows_run for completion in done)
        if reuse == NEEDED:  # filler is computed and not counted
            assert rows[reuse] < sum(computed) < rows[None]
        else:
            assert rows[reuse] == sum(computed)
        assert rows[reuse] <= rows[None]


def test_a_slot_whose_rows_do_not_fit_is_left_as_it_was(byte_tokenizer):
    model = make_model()
    engine = Engine(model, byte_tokenizer, decode=DecodeConfig(threshold=1.0), reuse=NEEDED)
    queue = engine._serve([engine._row(i, Request(prompt=[i + 1] * 9, max_new_tokens=20)) for i in range(2)])
    while not (engine.__dict__.get("state") and (engine.state.phase[:2] == Phase.SUB_BLOCK).all()):
        next(queue)
    state, slots = engine.state, torch.tensor([1, 0, engine.state.spare])
    before, needed = state.report(8).clone(), state.report(8)[:2, 2].tolist()
    assert min(needed) >= 2
    with torch.no_grad():
        engine.steps.active_rows(slots, needed[1])
    after = state.report(8)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_active_rows_are_masked_before_a_masked_one_or_dirty():
    rows = ["_m__m___", "________", "__mm__m_"]
    dirty = ["_______d", "__d_____", "________"]
    needed = ["xx_xx__x", "__x_____", "_xxx_xx_"]
    flags = [torch.tensor([[letter != "_" for letter in row] for row in part]) for part in (rows, dirty, needed)]
    assert torch.equal(needed_rows(*flags[:2]), flags[2])
    assert [row_bucket(count) for count in (1, 2, 3, 5, 8, 9, 16, 17)] == [1, 2, 4, 8, 8, 16, 16, 24]


def test_active_rows_need_the_sub_block_cache_and_no_reused_layers(byte_tokenizer):
    with pytest.raises(ValueError, match="use_block_cache"):
        Engine(make_model(), byte_tokenizer, decode=DecodeConfig(use_block_cache=False), reuse=NEEDED)
    with pytest.raises(ValueError, match="do not go together"):
        ReuseConfig(active_rows="needed", reuse_k=2)
    with pytest.raises(ValueError, match="all, needed"):
        ReuseConfig(active_rows="some")
