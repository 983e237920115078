"""The training objective: noise per block, two complementary views, token shift, cross-entropy on masked tokens.

Everything is a pure function of tensors and numbers. Source: method.md 2.2 to 2.4.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdllm.masks import Rows, clean_rows, training_rows

MINIMUM_NOISE = 1e-3  # the paper's epsilon: no block is drawn with zero noise
LOGITS_PER_CHUNK = 2**28  # 1 GiB of float32 logits at a time


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learnt."""

    kind: Literal["block_diffusion", "autoregressive"] = "block_diffusion"
    """block_diffusion adapts to decoding by blocks; autoregressive is plain next-token training (the control)."""
    block_size: int = 32
    """Tokens generated together; a power of two from 4 to 128. The published models use 32."""
    first_token: Literal["noised", "clean"] = "noised"
    """Row that predicts each block's first token: the noised view's row before it (the paper), or the clean half's
    (clean), which is the one that inference uses."""
    context_attention: Literal["block", "causal"] = "block"
    """Attention inside the clean half: by block (the paper), or token by token (causal), which keeps an exact
    autoregressive mode."""
    ar_loss_weight: float = 0.0
    """Weight of an added next-token loss on the clean half, 0 or more; above 0 it needs context_attention causal."""

    def __post_init__(self):
        if self.block_size not in (4, 8, 16, 32, 64, 128):
            raise ValueError(
                f"objective.block_size must be a power of two from 4 to 128, got {self.block_size}; try 32."
            )
        if self.ar_loss_weight < 0:
            raise ValueError(f"objective.ar_loss_weight must be 0 or more, got {self.ar_loss_weight}.")
        if self.ar_loss_weight > 0 and self.context_attention != "causal":
            raise ValueError(
                "objective.ar_loss_weight above 0 needs objective.context_attention causal, got block: with "
                "block-causal attention the clean rows see the tokens that they would have to predict."
            )
        if self.kind == "autoregressive" and (self.ar_loss_weight > 0 or self.first_token != "noised"):
            raise ValueError("objective.kind autoregressive has no views: leave ar_loss_weight and first_token alone.")


class Targets(NamedTuple):
    """The predictions that are scored, M of them; each tensor is [M]."""

    row: Tensor
    """int64 index into the flattened [B * R] rows: the row whose logits are scored."""
    token: Tensor
    """int64 token to predict."""
    noise_level: Tensor
    """float32 probability with which this token's block was masked in this view; NaN for next-token targets."""
    is_next_token: Tensor
    """bool, true for targets of the added autoregressive loss."""


def draw_noise(seed: int, index: int, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Draw the noise of one sample as a function of (seed, index) alone.

    Args:
        index: global sample index, counted over the whole run; also the second epoch's noise differs.
        length: L, a multiple of block_size.
    Returns:
        noise_level: [N] float32 in [0.001, 1], one per block.
        is_masked_first: [L] bool, true where view a masks the token (view b masks the others).
    """
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    uniform = torch.rand(length // block_size, generator=generator)
    noise_level = (1 - MINIMUM_NOISE) * uniform + MINIMUM_NOISE  # [N]
    is_masked_first = torch.rand(length, generator=generator) < noise_level.repeat_interleave(block_size)
    return noise_level, is_masked_first


def complementary_views(
    tokens: Tensor, is_response: Tensor, is_masked_first: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Noise each sample twice, so that every response token is masked in exactly one view and no other token ever is.

    Args:
        tokens: [B, L] int64; is_response, is_masked_first: [B, L] bool.
    Returns:
        noised: [B, 2L] int64, view a then view b.
        is_masked: [B, 2L] bool, true where `noised` holds a mask token that stands for a response token.
    Source: method.md 2.2.
    """
    is_masked = torch.cat([is_response & is_masked_first, is_response & ~is_masked_first], dim=1)  # [B, 2L]
    return tokens.repeat(1, 2).masked_fill(is_masked, mask_token_id), is_masked


def block_diffusion_inputs(
    batch: dict[str, Tensor], config: ObjectiveConfig, mask_token_id: int
) -> tuple[Tensor, Rows, Targets]:
    """Return the tokens [B, 3L], rows and targets of the block-diffusion objective.

    Token shift: the token at position i is predicted by row i - 1 of the view in which it is masked; with first_token
    "clean", a block's first token is predicted by row i - 1 of the clean half. A document's first token has no row
    before it and is never predicted.
    """
    tokens, position, is_response = batch["tokens"], batch["position"], batch["is_response"]
    L = tokens.shape[1]
    noised, is_masked = complementary_views(tokens, is_response, batch["is_masked_first"], mask_token_id)
    rows = training_rows(batch["document"], position)
    is_target = is_masked & (position >= 1).repeat(1, 2)  # [B, 2L]
    sample, column = is_target.nonzero(as_tuple=True)
    source = column - 1
    if config.first_token == "clean":
        starts_block = position.repeat(1, 2)[sample, column] % config.block_size == 0
        source = torch.where(starts_block, 2 * L + column % L - 1, source)
    by_view = torch.cat([batch["noise_level"], 1 - batch["noise_level"]], dim=1)  # [B, 2N]
    levels = by_view.repeat_interleave(config.block_size, dim=1)[sample, column]
    targets = Targets(sample * 3 * L + source, tokens.repeat(1, 2)[sample, column], levels, levels.isnan())
    if config.ar_loss_weight > 0:
        targets = _concatenate(targets, _next_token_targets(tokens, position, is_response, 3 * L, 2 * L))
    return torch.cat([noised, tokens], dim=1), rows, targets


def autoregressive_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Rows, Targets]:
    """Return the tokens [B, L], rows and targets of plain next-token training on the response tokens."""
    tokens = batch["tokens"]
    targets = _next_token_targets(tokens, batch["position"], batch["is_response"], tokens.shape[1], 0)
    return tokens, clean_rows(batch["document"], batch["position"]), targets


def _next_token_targets(tokens: Tensor, position: Tensor, is_response: Tensor, stride: int, offset: int) -> Targets:
    sample, column = (is_response & (position >= 1)).nonzero(as_tuple=True)
    levels = torch.full(sample.shape, torch.nan, device=tokens.device)
    return Targets(sample * stride + offset + column - 1, tokens[sample, column], levels, levels.isnan())


def _concatenate(first: Targets, second: Targets) -> Targets:
    return Targets(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def token_losses(hidden: Tensor, head_weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each target and whether its most likely token is right.

    The logits exist for a limited number of rows at a time and are computed again in the backward pass.

    Args:
        hidden: [M, C]; head_weight: [V, C]; token: [M] int64.
    Returns:
        loss: [M] float32, in nats; the softmax over the vocabulary is float32.
        is_correct: [M] bool.
    """
    rows_per_chunk = max(1, LOGITS_PER_CHUNK // head_weight.shape[0])
    if hidden.shape[0] <= rows_per_chunk:
        return _chunk_losses(hidden, head_weight, token)
    chunks = zip(hidden.split(rows_per_chunk), token.split(rows_per_chunk), strict=True)
    parts = [checkpoint(_chunk_losses, part, head_weight, target, use_reentrant=False) for part, target in chunks]
    return torch.cat([loss for loss, _ in parts]), torch.cat([is_correct for _, is_correct in parts])


def _chunk_losses(hidden: Tensor, head_weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, head_weight).float()  # [M, V]
    return F.cross_entropy(logits, token, reduction="none"), logits.detach().argmax(-1) == token


def weighted_sum(loss: Tensor, targets: Targets, ar_loss_weight: float) -> Tensor:
    """Return the sum of the losses, the added next-token ones times their weight. loss: [M] float32."""
    if ar_loss_weight == 0:  # next-token targets, if any, are then the objective itself (kind autoregressive)
        return loss.sum()
    return (loss * torch.where(targets.is_next_token, ar_loss_weight, 1.0)).sum()
