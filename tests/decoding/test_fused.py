"""The fused forward pass against the model's own, in float32; here with plain torch, in test_kernels with Triton."""

import pytest
import torch
from conftest import make_qwen
from torch.testing import assert_close

from fastdllm.decoding.cache import SlotCache
from fastdllm.decoding.fused import FusedForward
from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.reuse import LayerStore, ReuseConfig
from fastdllm.model import BlockDiffusionLM

MASK, SLOTS, CAPACITY = 259, 5, 40


def make_model(device="cpu", **changes):
    qwen = make_qwen(hidden_size=64, intermediate_size=96, initializer_range=0.2, **changes)  # head size 16
    torch.manual_seed(1)
    for name, parameter in qwen.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide a wrong one
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return BlockDiffusionLM(qwen, block_size=8, mask_token_id=MASK).to(device)


def make_rows(B, T, seed=0, device="cpu"):
    """Return random tokens, positions, places, slots and limits; the last row of each slot is not kept."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (B, T), generator=generator)
    positions = torch.randint(0, 500, (B, T), generator=generator)
    places = torch.stack([torch.randperm(CAPACITY, generator=generator)[:T] for _ in range(B)])
    places[:, -1] = CAPACITY  # the dump
    slots = torch.randperm(SLOTS, generator=generator)[:B]
    limits = torch.randint(1, CAPACITY + 3, (T, B), generator=generator).T  # not contiguous: the pass must see to it
    return [tensor.to(device) for tensor in (tokens, positions, places, slots, limits)]


def make_cache(model):
    cache = SlotCache(model, SLOTS, CAPACITY)
    generator = torch.Generator().manual_seed(2)
    for slab in (cache.keys, cache.values):
        slab.copy_(torch.randn(slab.shape, generator=generator))
    return cache


@torch.no_grad()
def run_both(model, fused, B, T):
    """Return hidden states, keys and values of a fused pass, and of the model's."""
    tokens, positions, places, slots, limits = make_rows(B, T, device=model.device)
    expected_cache, cache = make_cache(model), make_cache(model)
    expected_cache.select(slots, places, CAPACITY)
    is_seen = torch.arange(CAPACITY, device=model.device) < limits[..., None]
    expected = model.hidden_states(tokens, positions, is_seen[:, None], expected_cache)
    hidden = fused(tokens, PassRows(positions, places, slots, limits), cache)
    return [
        (states, caches.keys[..., :-1, :], caches.values[..., :-1, :])
        for states, caches in ((hidden, cache), (expected, expected_cache))
    ]


def check_pass(model, fused, B, T, **tolerance):
    for ours, theirs in zip(*run_both(model, fused, B, T), strict=True):
        assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 8), (5, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_fused_pass_equals_the_models(B, T, groups):
    model = make_model(num_key_value_heads=groups)
    check_pass(model, FusedForward(model), B, T)


def test_the_models_weights_become_views_of_the_merged_ones_and_keep_their_values():
    model, before = make_model(), make_model()
    fused = [FusedForward(model) for _ in range(2)]
    merged = [[weight.data_ptr() for layer in one._layers for weight in layer] for one in fused]
    assert merged[0] == merged[1]  # the second one finds them merged
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    attention, mlp = model.qwen.model.layers[0].self_attn, model.qwen.model.layers[0].mlp
    for first, second in ((attention.q_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert first.weight.untyped_storage().data_ptr() == second.weight.untyped_storage().data_ptr()


def test_statistics_are_those_of_the_logits():
    model = make_model()
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = FusedForward(model).statistics(hidden)
    with torch.no_grad():
        logits = model.logits(hidden)
    probability = logits.softmax(-1)
    assert torch.equal(found.best, logits.argmax(-1))
    assert_close(torch.stack([found.best_logit, found.second_logit], -1), logits.topk(2).values)
    assert_close((found.best_logit - found.log_sum_exp).exp(), probability.amax(-1))
    assert_close(found.entropy, torch.distributions.Categorical(probs=probability).entropy())


@pytest.mark.parametrize("mode", ["output_by_layer", "delta", "attn"])
@torch.no_grad()
def test_reused_layers_are_left_out_as_in_the_model(mode):
    model = make_model(num_hidden_layers=4)
    fused, B, T = FusedForward(model), 2, 8
    tokens, positions, places, slots, limits = make_rows(B, T)
    is_seen = torch.arange(CAPACITY) < limits[..., None]
    offsets, outputs, calls = torch.arange(T).expand(B, -1), [], []
    for run in ("model", "fused"):
        store = LayerStore(model, ReuseConfig(reuse_k=2, subset="1,2", reuse_mode=mode), SLOTS)
        cache = make_cache(model)
        for is_reused in (False, True):
            store.select(slots, offsets, is_reused=is_reused, is_full=not is_reused)
            changed = (tokens + is_reused) % 256
            if run == "fused":
                hidden = fused(changed, PassRows(positions, places, slots, limits), cache, store)
            else:
                cache.select(slots, places, CAPACITY)
                hidden = model.hidden_states(changed, positions, is_seen[:, None], cache, store)
        outputs.append(hidden)
        calls.append(model.layer_calls)
    assert_close(*outputs)
    assert calls[1] == 2 * calls[0] == 2 * (4 + (4 if mode == "attn" else 2))


def test_a_cache_longer_than_the_rotary_table_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="max_position_embeddings is 512"):
        tokens, *rows = make_rows(1, 1)
        FusedForward(model)(tokens, PassRows(*rows), SlotCache(model, SLOTS, 513))


@pytest.mark.parametrize(
    "place", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj", "model.embed_tokens"]
)
def test_a_model_whose_layers_are_not_plain_is_refused(place):
    class Gated(type(make_model().qwen.get_submodule(place))):
        pass

    model = make_model()
    model.qwen.get_submodule(place).__class__ = Gated
    with pytest.raises(ValueError, match="merges plain linear layers.*is_fused false"):
        FusedForward(model)
