"""A gated adapter in the fused pass against the model's own layers with it; test_kernels does the same with Triton."""

import pytest
import torch
from torch.testing import assert_close

from decoding.test_engine import make_prompts
from decoding.test_fused import CAPACITY, MASK, make_cache, make_model, make_rows
from decoding.test_verify import answers, make_engine, make_requests
from fastdllm.adapter import TARGETS, AdapterSettings, adapter_weights, add_adapter
from fastdllm.decoding.fused import FusedForward, can_fuse
from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.updates import layer_updates


def make_adapted(targets=TARGETS, rank=4, dtype=torch.float32, device="cpu", size=0.2, **changes):
    """A causal model with random updates, as if they were trained."""
    model = make_model(device, **changes).to(dtype)
    model.context_attention = "causal"
    add_adapter(model, AdapterSettings(rank=rank, alpha=2.5 * rank, targets=list(targets)), seed=1)
    generator = torch.Generator().manual_seed(3)
    for weight in adapter_weights(model).values():
        weight.data = (size * torch.randn(weight.shape, generator=generator)).to(device, dtype)
    return model


def masked_rows(B, T, seed=0, device="cpu"):
    """Return tokens of which every third is the mask token, and their rows."""
    tokens, *rows = make_rows(B, T, seed, device)
    tokens.flatten()[1::3] = MASK
    return tokens, PassRows(*rows)


@torch.no_grad()
def run_pass(fused, tokens, rows, **options):
    cache = make_cache(fused.model)
    hidden = fused(tokens, rows, cache, **options)
    return hidden, cache.keys[..., :-1, :], cache.values[..., :-1, :]


@torch.no_grad()
def run_model(model, tokens, rows):
    cache = make_cache(model)
    cache.select(rows.slots, rows.places, CAPACITY)
    is_seen = torch.arange(CAPACITY, device=model.device) < rows.limits[..., None]
    hidden = model.hidden_states(tokens, rows.positions, is_seen[:, None], cache)
    return hidden, cache.keys[..., :-1, :], cache.values[..., :-1, :]


def check_adapted(model, fused, B, T, **tolerance):
    tokens, rows = masked_rows(B, T, device=model.device)
    found, expected = run_pass(fused, tokens, rows), run_model(model, tokens, rows)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, **tolerance)
    return tokens, found[0]


@pytest.mark.parametrize("targets", [TARGETS, ["k_proj", "up_proj"], ["o_proj", "down_proj"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize(("B", "T", "max_few_rows"), [(1, 2, 256), (3, 8, 256), (3, 8, 4)])
def test_a_fused_pass_with_an_adapter_equals_the_models(targets, B, T, max_few_rows):
    model = make_adapted(targets, rank=3)
    tokens, hidden = check_adapted(model, FusedForward(model, max_few_rows=max_few_rows), B, T, atol=1e-5, rtol=1e-5)
    _, without = check_adapted(make_model(), FusedForward(make_model()), B, T)
    assert (hidden - without)[tokens == MASK].abs().max() > 0.1  # the updates are no small thing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_rows_are_those_without_an_adapter_to_the_bit(dtype):
    check_clean_rows(None, dtype)


def check_clean_rows(kernels, dtype, device="cpu"):
    """Assert it for a pass whose mask rows write where nobody looks; and that these are other ones."""
    models = make_adapted(dtype=dtype, size=5.0, device=device), make_model(device).to(dtype)
    tokens, rows = masked_rows(3, 8, device=device)
    rows = rows._replace(places=torch.where(tokens == MASK, CAPACITY, rows.places))
    found, expected = (run_pass(FusedForward(model, kernels), tokens, rows)[0] for model in models)
    is_clean = tokens != MASK
    assert torch.equal(found[is_clean], expected[is_clean])
    assert not torch.isclose(found[~is_clean].float(), expected[~is_clean].float()).all(-1).any()


def test_a_pass_said_to_be_clean_computes_no_update():
    adapted, plain = FusedForward(make_adapted(size=float("nan"))), FusedForward(make_model())
    tokens, *rows = make_rows(2, 5)
    found, expected = (
        run_pass(adapted, tokens, PassRows(*rows), is_clean=True),
        run_pass(plain, tokens, PassRows(*rows)),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_head_keeps_the_frozen_row_of_the_mask_token():
    adapted, plain = make_adapted(size=9.0), make_model()
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(
        FusedForward(adapted).statistics(hidden), FusedForward(plain).statistics(hidden), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_merged_update_is_that_of_its_parts_with_the_scale_in_it():
    model = make_adapted(["k_proj", "v_proj", "down_proj"], rank=3)
    layer = model.qwen.model.layers[0]
    updates, attention = layer_updates(layer), layer.self_attn
    assert updates.output is updates.gate_up is None and updates.down.ends == (64,)
    reduce, expand, ends, _ = updates.query_key_value
    assert ends == (64, 96, 128) and reduce.shape == (9, 64) and expand.shape == (128, 3)
    assert not expand[:64].any()  # the queries have none
    found = expand[64:96] @ reduce[3:6]
    assert_close(found, 2.5 * attention.k_proj.expand.data @ attention.k_proj.reduce.data)


@pytest.mark.parametrize(("draft_length", "groups"), [(4, "all"), (6, "0,3"), (0, "all")])
def test_an_engine_of_fused_passes_drafts_and_answers_as_one_of_plain_layers(byte_tokenizer, draft_length, groups):
    model, requests = make_adapted(), make_requests(make_prompts((1, 5, 8, 12, 21)))
    options = dict(draft_length=draft_length, draft_groups=groups)
    plain, fused = (
        answers(make_engine(model, byte_tokenizer, 3, engine={"is_fused": flag}, **options), requests)
        for flag in (False, True)
    )
    base = answers(make_engine(make_model(), byte_tokenizer, 5, mode="ar"), requests)
    assert [one.tokens for one in plain] == [one.tokens for one in fused] == [one.tokens for one in base]
    if draft_length:  # else the choice of what to draft follows the batch
        assert [one.accepted_drafts for one in plain] == [one.accepted_drafts for one in fused]
    adapted = answers(make_engine(model, byte_tokenizer, 5, mode="ar", engine={"is_fused": True}), requests)
    assert [one.tokens for one in adapted] == [one.tokens for one in base]


def test_an_adapter_can_be_fused_and_its_base_stays_views_of_merged_weights():
    model, before = make_adapted(), make_adapted()
    assert can_fuse(model)
    FusedForward(model)
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    attention = model.qwen.model.layers[0].self_attn
    storages = {part.base.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1
