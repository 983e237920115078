"""The training objective: noise per block, two complementary views, token shift, cross-entropy on masked tokens.

Everything is a pure function of tensors and numbers. Source: method.md 2.2 to 2.4.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdllm.masks import CLEAN, EMPTY, VIEW_A, Rows, clean_rows, training_rows

MINIMUM_NOISE = 1e-3  # the paper's epsilon: no block is drawn with zero noise
LOGITS_PER_PART = 2**28 - 2**26  # 384 MiB of half-precision logits at a time; their gradient takes their place


class SampleShape(NamedTuple):
    """How much a sample holds at most."""

    num_tokens: int
    """Places for tokens, whole blocks per document."""
    num_rows: int
    """Rows through the layers; there are exactly so many."""
    num_targets: int
    """Rows that predict something."""


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
    drop_dead_rows: bool = True
    """Leave out rows that the loss does not depend on (blocks of the prompt in the views, the clean half's end) and put
    more documents into a sample instead; loss and gradient of a document stay the same. Only for block_diffusion."""

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
        of_views = (self.ar_loss_weight, self.first_token, self.drop_dead_rows)
        if self.kind == "autoregressive" and of_views != (0.0, "noised", True):
            raise ValueError(
                "objective.kind autoregressive has no views: leave ar_loss_weight, first_token and drop_dead_rows out."
            )

    def sample_shape(self, sample_length: int) -> SampleShape:
        """Return what a sample holds: `sample_length` tokens, or more where their dead rows are left out."""
        if self.kind == "autoregressive":
            return SampleShape(sample_length, sample_length, sample_length)
        num_tokens = sample_length * (2 if self.drop_dead_rows else 1)
        return SampleShape(num_tokens, 3 * sample_length, sample_length * (2 if self.ar_loss_weight > 0 else 1))


class Targets(NamedTuple):
    """What each row predicts; every tensor is [B, R]."""

    token: Tensor
    """int64 token to predict; meaningless where `weight` is 0."""
    weight: Tensor
    """float32 weight of the prediction in the loss; 0 where the row predicts nothing."""
    noise_level: Tensor
    """float32 probability with which the token's block was masked in this view; NaN for next-token targets."""


def sample_generator(seed: int, index: int) -> torch.Generator:
    """Return a generator whose draws are a function of the seed and the global sample index alone."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw_noise(seed: int, index: int, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Draw the noise of one sample as a function of (seed, index) alone.

    Args:
        index: global sample index, counted over the whole run; also the second epoch's noise differs.
        length: L, a multiple of block_size.
    Returns:
        noise_level: [N] float32 in [0.001, 1], one per block.
        is_masked_first: [L] bool, true where view a masks the token (view b masks the others).
    """
    generator = sample_generator(seed, index)
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
    """Return the tokens, rows and targets of the block-diffusion objective, all [B, 3L]: view a | view b | clean.

    Token shift: the token at position i is predicted by row i - 1 of the view in which it is masked; with first_token
    "clean", a block's first token is predicted by row i - 1 of the clean half. A document's first token has no row
    before it and is never predicted. A clean row that predicts its next token for both reasons does so once, with both
    weights.
    """
    tokens, position, is_response = batch["tokens"], batch["position"], batch["is_response"]
    noised, is_masked = complementary_views(tokens, is_response, batch["is_masked_first"], mask_token_id)
    level = batch["noise_level"].repeat_interleave(config.block_size, dim=1)  # [B, L]
    is_first_masked = _next(is_masked[:, : tokens.shape[1]])  # by row: the token after it is masked in view a
    is_predicted = _next(is_response & (position >= 1))
    by_clean = is_predicted & (_next(position) % config.block_size == 0) & (config.first_token == "clean")
    in_view = [is_predicted & ~by_clean & is_first_masked, is_predicted & ~by_clean & ~is_first_masked]
    weight = torch.cat([*in_view, by_clean], dim=1).float()
    next_level = _next(level)
    clean_level = torch.where(by_clean, torch.where(is_first_masked, next_level, 1 - next_level), torch.nan)
    if config.ar_loss_weight > 0:
        weight[:, 2 * tokens.shape[1] :] += config.ar_loss_weight * is_predicted
    targets = Targets(
        token=_next(tokens).repeat(1, 3),
        weight=weight,
        noise_level=torch.cat([next_level, 1 - next_level, clean_level], dim=1),
    )
    return torch.cat([noised, tokens], dim=1), training_rows(batch["document"], position), targets


def autoregressive_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Rows, Targets]:
    """Return the tokens, rows and targets, all [B, L], of plain next-token training on the response tokens."""
    tokens, position = batch["tokens"], batch["position"]
    weight = _next(batch["is_response"] & (position >= 1)).float()
    targets = Targets(_next(tokens), weight, torch.full_like(weight, torch.nan))
    return tokens, clean_rows(batch["document"], position), targets


def _next(values: Tensor) -> Tensor:
    """Return at each place what stands at the next one, [B, L]; zero at the end of the sample."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


def drop_dead_rows(
    tokens: Tensor, rows: Rows, targets: Targets, block_size: int, num_rows: int
) -> tuple[Tensor, Rows, Targets]:
    """Return the rows that the loss depends on, in their order, and empty ones behind them: [B, num_rows] each.

    Rows are read and dropped by whole blocks. A noised block is read by its own rows alone, so it is needed if one of
    them predicts something. A clean block is read by later blocks of its document and by itself, so it is needed if a
    later noised block is, or if it or a later clean block predicts something. Loss and gradient stay what they were.

    Args:
        tokens: [B, R] int64; num_rows: a multiple of block_size, at least the needed rows of every sample.
    """
    B = tokens.shape[0]
    predicts = (targets.weight > 0).view(B, -1, block_size).any(-1)  # [B, blocks]
    half, document, position = (tensor[:, ::block_size] for tensor in rows)
    number = position // block_size  # of the block in its document
    is_clean = half == CLEAN
    reach = torch.where(predicts, number + is_clean, 0)  # clean blocks below this number are needed
    needed_below = torch.zeros_like(number).scatter_reduce(1, document, reach, "amax").gather(1, document)
    is_needed = torch.where(is_clean, number < needed_below, predicts)
    num_blocks = num_rows // block_size
    # a device assertion, which waits for nothing: rows beyond the budget would vanish from the loss in silence
    torch._assert_async((is_needed.sum(1) <= num_blocks).all(), f"a sample needs more than {num_rows} rows")
    order = (~is_needed).int().argsort(dim=1, stable=True)[:, :num_blocks]
    index = (order[:, :, None] * block_size + torch.arange(block_size, device=order.device)).flatten(1)
    is_empty = ~is_needed.gather(1, order).repeat_interleave(block_size, dim=1)
    place = torch.arange(num_rows, device=order.device)
    kept = Rows(*(tensor.gather(1, index) for tensor in rows))
    kept = Rows(
        half=kept.half.masked_fill(is_empty, VIEW_A),
        document=kept.document.masked_fill(is_empty, EMPTY),
        position=torch.where(is_empty, place, kept.position),
    )
    return tokens.gather(1, index), kept, Targets(*(tensor.gather(1, index) for tensor in targets))


def scored_rows(targets: Targets, num_scored: int) -> tuple[Tensor, Targets]:
    """Return which rows predict something, in their order, [B, num_scored] int64, and their targets.

    Samples with fewer are filled up with rows of weight 0; none may have more.
    """
    is_scored = targets.weight > 0
    torch._assert_async((is_scored.sum(1) <= num_scored).all(), f"a sample predicts more than {num_scored} tokens")
    index = (~is_scored).int().argsort(dim=1, stable=True)[:, :num_scored]
    return index, Targets(*(tensor.gather(1, index) for tensor in targets))


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of a linear head, whose gradients are worked out in the forward pass, part by part."""

    @staticmethod
    def forward(ctx, hidden, head_weight, token, weight, is_trained):
        with torch.autocast(hidden.device.type, enabled=False):  # it would undo the float32 sums
            head = head_weight.to(hidden.dtype)
            exact = torch.promote_types(head.dtype, torch.float32)
            head_gradient = torch.zeros(head.shape if is_trained else 0, dtype=exact, device=head.device)
            hidden_gradient, loss = torch.empty_like(hidden), torch.empty_like(weight, dtype=exact)
            is_correct = torch.empty_like(token, dtype=torch.bool)
            score = _compiled_scores() if hidden.is_cuda else _scores
            rows = _rows_per_part(len(hidden), len(head))
            logits = torch.empty(rows, len(head), dtype=head.dtype, device=head.device)
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                logits = logits[: len(hidden[part])]  # the last part may be short
                torch.mm(hidden[part], head.T, out=logits)
                loss[part], is_correct[part] = score(logits, token[part], weight[part])
                torch.mm(logits, head, out=hidden_gradient[part])  # what were logits is their gradient now
                if is_trained:
                    _add_product(head_gradient, logits, hidden[part])
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.head_dtype, ctx.is_trained = head_weight.dtype, is_trained
        ctx.mark_non_differentiable(loss, is_correct)
        return (loss * weight).sum(), loss, is_correct

    @staticmethod
    def backward(ctx, total, *_):
        hidden_gradient, head_gradient = ctx.saved_tensors
        by_head = head_gradient.mul_(total).to(ctx.head_dtype) if ctx.is_trained else None
        return hidden_gradient * total, by_head, None, None, None


def token_losses(hidden: Tensor, head_weight: Tensor, token: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of the targets' cross-entropies, each of them, and whether no token is likelier than it.

    The logits exist for some rows at a time. Only the sum has a gradient.

    Args:
        hidden: [M, C]; head_weight: [V, C]; token: [M] int64; weight: [M] float32, 0 leaves a row out.
    Returns:
        total: float32 (float64 for float64 inputs) []; loss: [M] of that dtype, in nats; is_correct: [M] bool.
    """
    is_trained = torch.is_grad_enabled() and head_weight.requires_grad
    return _LinearCrossEntropy.apply(hidden, head_weight, token, weight, is_trained)


def _scores(logits: Tensor, token: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss [M] and is_correct [M]; `logits` [M, V] become the weighted loss's gradient by them.

    The softmax is float32.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = exact.amax(-1)  # not the place of it, with which the compiler would read the logits twice
    exponential = (exact - top[:, None]).exp()
    total = exponential.sum(-1)
    target = exact.gather(1, token[:, None]).squeeze(1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == token[:, None]
    logits.copy_((exponential / total[:, None] - is_target.to(exact.dtype)) * weight[:, None])
    return total.log() + top - target, target == top


@cache
def _compiled_scores():
    return torch.compile(_scores, dynamic=False, fullgraph=True)  # a break would keep another [M, V]


def _rows_per_part(num_rows: int, vocabulary_size: int) -> int:
    """Return how many rows are scored at a time: an even share of all rows within the budget, where there is one."""
    most = max(1, LOGITS_PER_PART // vocabulary_size)
    fewest = -(-num_rows // most)
    even = [number for number in range(fewest, 2 * fewest + 1) if number and num_rows % number == 0]
    return num_rows // even[0] if even else most


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient^T hidden to `total` [V, C], with float32 accumulation."""
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.T, hidden)
    elif total.is_cuda:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total += gradient.T.float() @ hidden.float()
