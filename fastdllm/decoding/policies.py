"""Unmasking: what is proposed for a masked position, with which confidence, and which proposals are accepted."""

import torch
from torch import Tensor


def propose(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, uniform: Tensor | None = None):
    """Propose a token for every position.

    At temperature 0 the proposal is the most likely token and its confidence the softmax probability at temperature 1.
    Above 0 it is drawn from the nucleus: the smallest set of most likely tokens whose probability exceeds `top_p`; the
    confidence is then its renormalised probability. All probabilities are float32.

    Args:
        logits: [..., V] float32.
        uniform: [...] float32 in [0, 1), one draw for each position; needed above temperature 0.
    Returns:
        token: [...] int64; confidence: [...] float32.
    Source: method.md 3.2; the published code takes the softmax in the model's dtype and samples for the first row only.
    """
    if temperature == 0:
        best, token = logits.max(-1)
        return token, (best - logits.logsumexp(-1)).exp()
    assert uniform is not None, "sampling needs uniform draws"
    probability, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    below = probability.cumsum(-1) - probability  # mass of the more likely tokens
    nucleus = probability.masked_fill(below > top_p, 0.0)  # the most likely token always stays
    nucleus = nucleus / nucleus.sum(-1, keepdim=True)
    rank = (nucleus.cumsum(-1) <= uniform[..., None]).sum(-1, keepdim=True)
    rank = rank.clamp(max=(nucleus > 0).sum(-1, keepdim=True) - 1)  # rounding must not leave the nucleus
    return order.gather(-1, rank).squeeze(-1), nucleus.gather(-1, rank).squeeze(-1)


def accept_by_threshold(confidence: Tensor, is_candidate: Tensor, threshold: float) -> Tensor:
    """Accept every candidate above the threshold, and always the most confident one of each row.

    Threshold 1.0 therefore means one token per denoising step.

    Args:
        confidence: [B, T] float32; is_candidate: [B, T] bool, the masked positions of the current sub-block.
    Returns:
        [B, T] bool; a row without candidates accepts nothing.
    Source: method.md 3.2.
    """
    confidence = confidence.masked_fill(~is_candidate, -1.0)
    best = torch.zeros_like(is_candidate).scatter(-1, confidence.argmax(-1, keepdim=True), True)
    return is_candidate & (best | (confidence > threshold))
