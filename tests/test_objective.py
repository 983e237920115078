"""The objective against a slow double-loop reference, numbers worked out by hand, and the decoder that uses it."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_qwen
from torch.nn import functional as F
from torch.testing import assert_close

from fastdllm import masks, objective
from fastdllm.masks import decode_attention_mask
from fastdllm.model import BlockDiffusionLM
from fastdllm.objective import ObjectiveConfig
from fastdllm.training.module import TrainingPass

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
    return with_noise(dict(tokens=tokens, document=document, position=position, is_response=is_response), seed, D)


def with_noise(batch, seed, block_size):
    noise = [objective.draw_noise(seed, index, batch["tokens"].shape[1], block_size) for index in range(2)]
    levels, masked = zip(*noise, strict=True)
    return batch | {"noise_level": torch.stack(levels), "is_masked_first": torch.stack(masked)}


def random_batch(seed, block_size, sample_length):
    """Two samples of random documents, prompts (some without a response, some answering in turns) and padding."""
    generator = np.random.default_rng(seed)
    L = sample_length
    sample = [np.full((2, L), MASK), np.zeros((2, L), int), np.zeros((2, L), int), np.zeros((2, L), bool)]
    tokens, document, position, is_response = sample
    for row in range(2):
        start, label = 0, 0
        while start < L and not (label and generator.random() < 0.2):
            room = L - start
            length = int(generator.integers(1, room + 1) if generator.random() < 0.5 else min(room, block_size + 1))
            end, label = start - (-length // block_size) * block_size, label + 1
            tokens[row, start : start + length] = generator.integers(0, 256, length)
            document[row, start:end], position[row, start:end] = label, np.arange(end - start)
            prompt = int(generator.integers(0, length + 1))
            in_turns = generator.random(length) < 0.3 if generator.random() < 0.3 else np.ones(length, bool)
            is_response[row, start : start + length] = in_turns & (np.arange(length) >= prompt)
            start = end
        position[row, start:] = np.arange(L - start)
    names = ("tokens", "document", "position", "is_response")
    return with_noise(
        {name: torch.from_numpy(array) for name, array in zip(names, sample, strict=True)}, seed, block_size
    )


def with_room(batch):
    """The batch in samples twice as long, as they are where dead rows are left out."""
    return {name: torch.cat([values, torch.zeros_like(values)], dim=1) for name, values in batch.items()}


def make_model(context="block", seed=0, block_size=D):
    qwen = make_qwen(seed, initializer_range=0.2).double()
    return BlockDiffusionLM(qwen, block_size=block_size, mask_token_id=MASK, context_attention=context)


def hidden_of(model, batch, config):
    """Hidden states of all rows, [B, 3L, C], without anything left out."""
    tokens, rows, targets = objective.block_diffusion_inputs(batch, config, MASK)
    predicate = masks.training_attention(rows, config.block_size, config.context_attention)
    attention_mask = masks.dense_attention_mask(predicate, *tokens.shape, tokens.device)
    return model.hidden_states(tokens, rows.position, attention_mask), targets


def plain_loss(model, batch, config):
    """The loss over all rows, all logits at once."""
    hidden, targets = hidden_of(model, batch, config)
    losses = F.cross_entropy(model.qwen.lm_head(hidden).flatten(0, 1), targets.token.flatten(), reduction="none")
    return (losses * targets.weight.flatten()).sum()


def slow_loss(model, batch, config):
    """Each document alone, each view alone as one 2L row [noised | clean] (the published layout), token by token."""
    total, count = 0.0, 0
    for sample in range(batch["tokens"].shape[0]):
        for document in set(batch["document"][sample].tolist()) - {0}:
            inside = batch["document"][sample] == document
            clean, response = batch["tokens"][sample][inside], batch["is_response"][sample][inside]
            n = len(clean)
            block = torch.arange(n) // config.block_size
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
                        source = n + i - 1 if config.first_token == "clean" and i % config.block_size == 0 else i - 1
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


CONFIG_NAMES = ["published", "first_clean", "causal", "causal_ar"]


def gradients(model, loss):
    weights = dict(model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_loss_and_gradients_equal_the_slow_reference(config):
    batch, model = make_batch(), make_model(config.context_attention)
    expected, count = slow_loss(model, batch, config)
    total = plain_loss(model, batch, config)
    assert_close(total, expected, atol=1e-6, rtol=1e-7)  # float64, but the library's norms are float32
    _, targets = hidden_of(model, batch, config)
    is_noised = (targets.weight > 0) & ~targets.noise_level.isnan()
    assert int(is_noised.sum()) == count == int((batch["is_response"] & (batch["position"] > 0)).sum())
    theirs = gradients(model, expected)
    for name, ours in gradients(model, total).items():
        assert_close(ours, theirs[name], atol=1e-5, rtol=1e-4)  # the library's norms are float32


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_training_pass_without_dead_rows_equals_the_slow_reference(config):
    batch, model = make_batch(), make_model(config.context_attention)
    scores = TrainingPass(model, config, 24)(with_room(batch))
    expected, count = slow_loss(model, batch, config)
    assert_close(scores.total, expected, atol=1e-6, rtol=1e-7)
    theirs = gradients(model, expected)
    for name, ours in gradients(model, scores.total).items():
        assert_close(ours, theirs[name], atol=1e-5, rtol=1e-4)
    assert scores.num_rows == 144 and int((scores.targets.weight > 0).sum()) >= count
    assert 0 < int(scores.num_empty_rows) < 144


@pytest.mark.parametrize("seed", range(24))
def test_dropping_dead_rows_changes_neither_loss_nor_gradient(seed):
    block_size = (4, 8, 16, 32, 64, 128)[seed % 6]
    config = dataclasses.replace(CONFIGS[seed // 6], block_size=block_size)
    L = 6 * block_size if block_size <= 32 else 3 * block_size
    batch = random_batch(seed, block_size, L)
    model = make_model(config.context_attention, block_size=block_size)
    tokens, rows, targets = objective.block_diffusion_inputs(batch, config, MASK)
    kept = objective.drop_dead_rows(tokens, rows, targets, block_size, 3 * L)
    assert_close(kept[2].weight.sum(), targets.weight.sum())
    scores = TrainingPass(model, config, L)(with_room(batch))
    expected = plain_loss(model, batch, config)
    assert_close(scores.total, expected, atol=1e-9, rtol=1e-9)
    theirs = gradients(model, expected)
    for name, ours in gradients(model, scores.total).items():
        assert_close(ours, theirs[name], atol=1e-5, rtol=1e-4)
    if seed % 6 < 2:
        assert_close(expected, torch.as_tensor(slow_loss(model, batch, config)[0]).double(), atol=1e-6, rtol=1e-7)


def test_a_row_budget_that_is_too_small_is_an_error():
    batch = make_batch()
    inputs = objective.block_diffusion_inputs(batch, CONFIGS[0], MASK)
    with pytest.raises(RuntimeError, match="needs more than 32 rows"):
        objective.drop_dead_rows(*inputs, D, 32)
    with pytest.raises(RuntimeError, match="predicts more than 8 tokens"):
        objective.scored_rows(inputs[2], 8)


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
    hidden, _ = hidden_of(make_model(context), batch, config)
    view_a, view_b, clean = hidden.chunk(3, dim=1)
    assert_close(view_a, view_b)
    if context == "block":
        assert_close(view_a, clean)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_a_noised_block_equals_cached_decoding_of_that_block(context):
    """Training sees what decoding sees: the prompt appended block by block to a cache, then one denoising pass."""
    batch, model = make_batch(), make_model(context)
    hidden, _ = hidden_of(model, batch, ObjectiveConfig(block_size=D, context_attention=context))
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
    before, _ = hidden_of(model, batch, config)
    batch["tokens"] = batch["tokens"].clone()
    batch["tokens"][0, 8:16] = (batch["tokens"][0, 8:16] + 1) % 256  # blocks 0 and 1 of the second document
    after, _ = hidden_of(model, batch, config)
    moved = (before[0] - after[0]).abs().amax(-1).view(3, 24) > 1e-12
    assert not moved[:, :8].any() and not moved[:, 20:].any()
    assert moved[:, 8:20].any(dim=1).all()
    noised = moved[0] | moved[1]
    batch["tokens"][0, 8:16] = (batch["tokens"][0, 8:16] - 1) % 256
    batch["tokens"][0, 16:18] = (batch["tokens"][0, 16:18] + 1) % 256  # the second document's last block
    after, _ = hidden_of(model, batch, config)
    moved = (before[0] - after[0]).abs().amax(-1).view(3, 24) > 1e-12
    assert noised.any() and not moved[:, :16].any() and moved[:, 16:20].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_per_part", [50 * 8, 2**27])
def test_losses_in_parts_equal_float64_ones_with_gradients(monkeypatch, dtype, logits_per_part):
    monkeypatch.setattr(objective, "LOGITS_PER_PART", logits_per_part)
    torch.manual_seed(0)
    hidden, head = torch.randn(48, 16).to(dtype), torch.randn(50, 16)
    token, weight = torch.randint(0, 50, (48,)), torch.rand(48).round(decimals=1)
    assert (weight == 0).any()
    inputs = [hidden.requires_grad_(), head.requires_grad_()]
    total, loss, is_correct = objective.token_losses(*inputs, token, weight)
    exact = [tensor.detach().to(dtype).double().requires_grad_() for tensor in inputs]
    expected = F.cross_entropy(exact[0] @ exact[1].T, token, reduction="none")
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}  # logits and their gradient are bf16
    assert_close(loss, expected.float(), **tolerance)
    if dtype == torch.float32:
        assert torch.equal(is_correct, (exact[0] @ exact[1].T).argmax(-1) == token)
    ours = torch.autograd.grad(3 * total, inputs)
    theirs = torch.autograd.grad(3 * (expected * weight).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.float(), b.float(), **tolerance)
    assert ours[1].dtype == torch.float32 and ours[0].dtype == dtype


def test_a_frozen_head_gets_no_gradient_and_any_number_of_rows_is_scored(monkeypatch):
    monkeypatch.setattr(objective, "LOGITS_PER_PART", 50 * 8)
    torch.manual_seed(0)
    hidden, head = torch.randn(47, 16, requires_grad=True), torch.randn(50, 16)
    token, weight = torch.randint(0, 50, (47,)), torch.ones(47)  # 47 is prime: five parts of 8 and one of 7
    total, _, _ = objective.token_losses(hidden, head, token, weight)
    expected = F.cross_entropy(hidden @ head.T, token, reduction="sum")
    assert_close(total, expected)
    assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (total, expected)))
    assert head.grad is None


def test_autoregressive_targets_are_the_next_response_tokens():
    batch = make_batch()
    tokens, rows, targets = objective.autoregressive_inputs(batch)
    assert torch.equal(tokens, batch["tokens"]) and (rows.half == masks.CLEAN).all()
    is_target = targets.weight > 0
    assert torch.equal(tokens[:, 1:][is_target[:, :-1]], targets.token[is_target])
    assert int(is_target.sum()) == int((batch["is_response"] & (batch["position"] > 0)).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 24}, "power of two"),
        ({"ar_loss_weight": 0.3}, "needs objective.context_attention causal"),
        ({"ar_loss_weight": -1.0}, "0 or more"),
        ({"kind": "autoregressive", "first_token": "clean"}, "has no views"),
        ({"kind": "autoregressive", "drop_dead_rows": False}, "has no views: leave .* drop_dead_rows"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**changes)
