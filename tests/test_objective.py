"""The objective against a slow double-loop reference, numbers worked out by hand, and the decoder that uses it."""

import pytest
import torch
from conftest import make_qwen
from torch.nn import functional as F
from torch.testing import assert_close

from fastdllm import masks, objective
from fastdllm.masks import decode_attention_mask
from fastdllm.model import BlockDiffusionLM
from fastdllm.objective import ObjectiveConfig

MASK, D = 259, 4


def make_batch(seed=0):
    """Two samples of 24 tokens: two documents of 8 and 12 places (padded inside) and padding; one document."""
    torch.manual_seed(seed)
    document = torch.tensor([[1] * 8 + [2] * 12 + [0] * 4, [1] * 24])
    position = torch.stack([torch.cat([torch.arange(8), torch.arange(12), torch.arange(4)]), torch.arange(24)])
    tokens = torch.randint(0, 256, (2, 24))
    is_response = torch.zeros(2, 24, dtype=torch.bool)
    is_response[0, 3:7] = is_response[0, 13:18] = is_response[1, 5:24] = True
    tokens[0, 7] = tokens[0, 18:24] = MASK  # block padding and the rest of the row
    noise = [objective.draw_noise(seed, index, 24, D) for index in range(2)]
    return dict(
        tokens=tokens,
        document=document,
        position=position,
        is_response=is_response,
        noise_level=torch.stack([level for level, _ in noise]),
        is_masked_first=torch.stack([masked for _, masked in noise]),
    )


def make_model(context="block", seed=0):
    return BlockDiffusionLM(
        make_qwen(seed, initializer_range=0.2).double(), block_size=D, mask_token_id=MASK, context_attention=context
    )


def losses_of(model, batch, config):
    tokens, rows, targets = objective.block_diffusion_inputs(batch, config, MASK)
    predicate = masks.training_attention(rows, D, config.context_attention)
    attention_mask = masks.dense_attention_mask(predicate, tokens.shape[0], tokens.shape[1], tokens.device)
    hidden = model.hidden_states(tokens, rows.position, attention_mask)
    loss, _ = objective.token_losses(hidden.flatten(0, 1)[targets.row], model.qwen.lm_head.weight, targets.token)
    return loss, targets, hidden


def slow_loss(model, batch, config):
    """Each document alone, each view alone as one 2L row [noised | clean] (the published layout), token by token."""
    total, count = 0.0, 0
    for sample in range(batch["tokens"].shape[0]):
        for document in set(batch["document"][sample].tolist()) - {0}:
            inside = batch["document"][sample] == document
            clean, response = batch["tokens"][sample][inside], batch["is_response"][sample][inside]
            n = len(clean)
            block = torch.arange(n) // D
            allowed = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
            for query in range(n):
                for key in range(n):
                    allowed[query, key] = block[key] == block[query]
                    allowed[query, n + key] = block[key] < block[query]
                    causal = config.context_attention == "causal"
                    allowed[n + query, n + key] = key <= query if causal else block[key] <= block[query]
            for is_first in (True, False):
                masked = response & (batch["is_masked_first"][sample][inside] == is_first)
                row = torch.cat([torch.where(masked, MASK, clean), clean])[None]
                positions = torch.arange(n).repeat(2)[None]
                logits = model.qwen.lm_head(model.hidden_states(row, positions, allowed[None, None]))[0]
                for i in range(1, n):
                    if masked[i]:
                        source = n + i - 1 if config.first_token == "clean" and i % D == 0 else i - 1
                        total = total + F.cross_entropy(logits[source], clean[i])
                        count += 1
                    if response[i] and is_first and config.ar_loss_weight:
                        total = total + config.ar_loss_weight * F.cross_entropy(logits[n + i - 1], clean[i])
    return total, count


CONFIGS = [
    ObjectiveConfig(block_size=D),
    ObjectiveConfig(block_size=D, first_token="clean"),
    ObjectiveConfig(block_size=D, context_attention="causal"),
    ObjectiveConfig(block_size=D, context_attention="causal", first_token="clean", ar_loss_weight=0.3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["published", "first_clean", "causal", "causal_ar"])
def test_loss_and_gradients_equal_the_slow_reference(config):
    batch, model = make_batch(), make_model(config.context_attention)
    loss, targets, _ = losses_of(model, batch, config)
    total = objective.weighted_sum(loss, targets, config.ar_loss_weight)
    expected, count = slow_loss(model, batch, config)
    assert_close(total.double(), expected, atol=1e-5, rtol=1e-6)  # our cross-entropy is float32 by design
    assert int((~targets.is_next_token).sum()) == count == int((batch["is_response"] & (batch["position"] > 0)).sum())
    weights = [model.qwen.model.layers[0].self_attn.k_proj.weight, model.qwen.model.embed_tokens.weight]
    for ours, theirs in zip(torch.autograd.grad(total, weights), torch.autograd.grad(expected, weights), strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_two_views_mask_every_response_token_once_and_no_other():
    batch = make_batch()
    noised, is_masked = objective.complementary_views(
        batch["tokens"], batch["is_response"], batch["is_masked_first"], MASK
    )
    first, second = is_masked.chunk(2, dim=1)
    assert torch.equal(first ^ second, batch["is_response"])
    assert not (first & second).any()
    assert (noised[is_masked] == MASK).all()
    assert torch.equal(noised[~is_masked], batch["tokens"].repeat(1, 2)[~is_masked])


def test_noise_is_a_function_of_seed_and_index_alone():
    level, masked = objective.draw_noise(3, 7, 64, 32)
    torch.rand(5)  # the global generator must not matter
    again, masked_again = objective.draw_noise(3, 7, 64, 32)
    assert torch.equal(level, again) and torch.equal(masked, masked_again)
    assert not torch.equal(level, objective.draw_noise(3, 8, 64, 32)[0])
    assert not torch.equal(level, objective.draw_noise(4, 7, 64, 32)[0])
    levels = torch.cat([objective.draw_noise(0, index, 128, 4)[0] for index in range(300)])
    assert levels.min() >= objective.MINIMUM_NOISE and abs(levels.mean() - 0.5) < 0.01
    shares = torch.stack([objective.draw_noise(0, index, 4096, 4096)[1].float().mean() for index in range(20)])
    drawn = torch.cat([objective.draw_noise(0, index, 4096, 4096)[0] for index in range(20)])
    assert_close(shares, drawn, atol=0.03, rtol=0)  # binomial noise of 4096 draws


@pytest.mark.parametrize("context", ["block", "causal"])
def test_an_unmasked_view_equals_the_clean_half(context):
    batch, config = make_batch(), ObjectiveConfig(block_size=D, context_attention=context)
    batch["is_response"] = torch.zeros_like(batch["is_response"])
    _, _, hidden = losses_of(make_model(context), batch, config)
    view_a, view_b, clean = hidden.chunk(3, dim=1)
    assert_close(view_a, view_b)
    if context == "block":
        assert_close(view_a, clean)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_a_noised_block_equals_cached_decoding_of_that_block(context):
    """Training sees what decoding sees: the prompt appended block by block to a cache, then one denoising pass."""
    batch, model = make_batch(), make_model(context)
    _, _, hidden = losses_of(model, batch, ObjectiveConfig(block_size=D, context_attention=context))
    noised, _ = objective.complementary_views(batch["tokens"], batch["is_response"], batch["is_masked_first"], MASK)
    block = 3
    from fastdllm.decoding.cache import SlotCache

    cache = SlotCache(model, 1, 24)
    for start in range(0, block * D + 1, D):
        positions = torch.arange(start, start + D)[None]
        keys = torch.arange(start + D)[None]
        is_last = start == block * D
        attention_mask = decode_attention_mask(positions, keys, D, "block" if is_last else context)
        cache.select(torch.tensor([0]), positions, start + D)
        tokens = noised if is_last else batch["tokens"]
        output = model.hidden_states(tokens[1:2, start : start + D], positions, attention_mask, cache)
    assert_close(output[0], hidden[1, block * D : (block + 1) * D])


def test_nothing_leaks_from_later_blocks_or_neighbouring_documents():
    batch, model, config = make_batch(), make_model(), ObjectiveConfig(block_size=D)
    _, _, before = losses_of(model, batch, config)
    batch["tokens"] = batch["tokens"].clone()
    batch["tokens"][0, 8:16] = (batch["tokens"][0, 8:16] + 1) % 256  # blocks 0 and 1 of the second document
    _, _, after = losses_of(model, batch, config)
    moved = (before[0] - after[0]).abs().amax(-1).view(3, 24) > 1e-12
    assert not moved[:, :8].any() and not moved[:, 20:].any()
    assert moved[:, 8:20].any(dim=1).all()
    noised = moved[0] | moved[1]
    batch["tokens"][0, 8:16] = (batch["tokens"][0, 8:16] - 1) % 256
    batch["tokens"][0, 16:18] = (batch["tokens"][0, 16:18] + 1) % 256  # the second document's last block
    _, _, after = losses_of(model, batch, config)
    moved = (before[0] - after[0]).abs().amax(-1).view(3, 24) > 1e-12
    assert noised.any() and not moved[:, :16].any() and moved[:, 16:20].any()


def test_chunked_losses_equal_whole_ones_with_gradients(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    token = torch.randint(0, 50, (37,))
    whole, is_correct = objective.token_losses(hidden, weight, token)
    expected = torch.autograd.grad(whole.sum(), [hidden, weight])
    monkeypatch.setattr(objective, "LOGITS_PER_CHUNK", 50 * 8)
    chunked, is_correct_chunked = objective.token_losses(hidden, weight, token)
    assert_close(chunked, whole)
    assert torch.equal(is_correct, is_correct_chunked)
    for ours, theirs in zip(torch.autograd.grad(chunked.sum(), [hidden, weight]), expected, strict=True):
        assert_close(ours, theirs)
    assert_close(whole, F.cross_entropy(hidden.double() @ weight.double().T, token, reduction="none").float())


def test_autoregressive_targets_are_the_next_response_tokens():
    batch = make_batch()
    tokens, rows, targets = objective.autoregressive_inputs(batch)
    assert torch.equal(tokens, batch["tokens"]) and (rows.half == masks.CLEAN).all()
    flat = tokens.flatten()
    assert torch.equal(flat[targets.row + 1], targets.token)
    assert len(targets.token) == int((batch["is_response"] & (batch["position"] > 0)).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 24}, "power of two"),
        ({"ar_loss_weight": 0.3}, "needs objective.context_attention causal"),
        ({"ar_loss_weight": -1.0}, "0 or more"),
        ({"kind": "autoregressive", "first_token": "clean"}, "has no views"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**changes)
