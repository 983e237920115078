"""Log-likelihood of a continuation: the published single-token form for diffusion, the exact one for AR."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdllm.masks import decode_attention_mask
from fastdllm.model import BlockDiffusionLM

Pair = tuple[list[int], list[int]]  # context, target
Score = tuple[float, bool]  # log-probability in nats, whether greedy decoding gives the target
LIKELIHOODS = {"ar": "exact", "diffusion": "first token, published form"}  # what is computed, by mode


@torch.inference_mode()
def autoregressive_scores(model: BlockDiffusionLM, pairs: list[Pair]) -> list[Score]:
    """Return the sum of the log-probabilities of all target tokens, and whether each is the most probable."""
    tokens, positions = _pad(model, [context + target for context, target in pairs])  # [B, T]
    attention_mask = decode_attention_mask(positions, positions, model.block_size, "causal")
    hidden = model.hidden_states(tokens, positions, attention_mask)  # [B, T, C]
    scores = []
    for row, (context, target) in zip(hidden, pairs, strict=True):
        before = row[len(context) - 1 : len(context) + len(target) - 1]  # rows that predict the target
        log_probability = F.log_softmax(model.qwen.lm_head(before).float(), dim=-1)  # float32
        wanted = torch.tensor(target, device=row.device)
        is_greedy = bool((log_probability.argmax(-1) == wanted).all())
        scores.append((log_probability.gather(-1, wanted[:, None]).sum().item(), is_greedy))
    return scores


@torch.inference_mode()
def masked_scores(model: BlockDiffusionLM, pairs: list[Pair], end_token_id: int) -> list[Score]:
    """Return the log-probability of the first target token alone, and False.

    The blocks from the target's on are seen in both directions, like a block being denoised; those before it attend as
    the model's context does. Source: method.md 4 (the published form knows block-causal contexts only).
    """
    rows = [masked_row(*pair, model.block_size, model.mask_token_id, end_token_id) for pair in pairs]
    tokens, positions = _pad(model, rows)  # [B, T]
    block_size = model.block_size
    context = decode_attention_mask(positions, positions, block_size, model.context_attention)  # [B, 1, T, T]
    blockwise = decode_attention_mask(positions, positions, block_size, "block")
    starts = torch.tensor([len(context) // block_size * block_size for context, _ in pairs], device=tokens.device)
    is_noised = (positions >= starts[:, None])[:, None, :, None]  # [B, 1, T, 1]
    hidden = model.hidden_states(tokens, positions, torch.where(is_noised, blockwise, context))  # [B, T, C]
    ends = torch.tensor([len(context) - 1 for context, _ in pairs], device=tokens.device)
    logits = model.qwen.lm_head(hidden[torch.arange(len(pairs)), ends]).float()  # [B, V]; token shift
    wanted = torch.tensor([target[0] for _, target in pairs], device=tokens.device)
    scores = F.log_softmax(logits, dim=-1).gather(-1, wanted[:, None]).squeeze(-1)  # float32
    return [(score, False) for score in scores.tolist()]


def check_first_tokens(texts: Sequence[tuple[str, str]], pairs: Sequence[Pair]) -> None:
    """Raise ValueError if the published likelihood cannot tell two continuations of one context apart.

    Args:
        texts: context and continuation as text; pairs: the same as tokens.
    """
    seen: dict[tuple[tuple[int, ...], int], int] = {}
    for number, (context, target) in enumerate(pairs):
        other = seen.setdefault((tuple(context), target[0]), number)
        if pairs[other][1] != target:
            raise ValueError(
                f"mode diffusion scores the first token of an answer alone ({LIKELIHOODS['diffusion']}), and "
                f"{texts[other][1]!r} and {texts[number][1]!r} begin with the same one; use mode ar, or a task that "
                "generates its answers."
            )


def masked_row(context: list[int], target: list[int], block_size: int, mask_token_id: int, end: int) -> list[int]:
    """Return the row of the published single-token likelihood.

    The first target token is masked and later ones stay visible; mask tokens fill up to the next multiple of the block
    size (a whole block where the row is aligned), and the first of them is the end token. Source: method.md 4.
    """
    row = [*context, mask_token_id, *target[1:]]
    return row + [end] + [mask_token_id] * (block_size - len(row) % block_size - 1)


def _pad(model: BlockDiffusionLM, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens and positions, [B, T] each, padded on the right to whole blocks: later blocks are never seen."""
    length = -(-max(map(len, rows)) // model.block_size) * model.block_size
    tokens = torch.tensor([row + [model.mask_token_id] * (length - len(row)) for row in rows], device=model.device)
    return tokens, torch.arange(length, device=model.device).expand(len(rows), -1)
