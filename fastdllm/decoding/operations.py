"""The parts of a decode-time forward pass in plain torch: what `kernels` must equal, and what runs where Triton cannot.

Both modules offer the same functions. A product may leave its result in several parts [P, R, N] that are still to be
added up: whoever reads them next adds them on the way, with what else it does.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdllm.decoding.updates import LowRankUpdate


class PassRows(NamedTuple):
    """Where the tokens of a pass stand; all int64."""

    positions: Tensor
    """[B, T]: of the rotary angles."""
    places: Tensor
    """[B, T]: where keys and values are written in the slot; rows that are nobody's share a place that nobody reads."""
    slots: Tensor
    """[B]."""
    limits: Tensor
    """[B, T]: a row sees the places below its limit, from 0 (nothing) to the capacity."""
    own_firsts: Tensor | None = None
    """[B, T]: a row sees the places from here up to its end below too: those of its group, behind every limit. None: no
    row has any."""
    own_ends: Tensor | None = None
    """[B, T]: where they end; the same as the first, or less, for a row without any."""

    @property
    def has_own(self) -> bool:
        """Whether rows may see places of their own besides those below their limits."""
        return self.own_firsts is not None

    def sees(self, places: Tensor) -> Tensor:
        """Return which of the places [S] each row sees, [B, T, S] bool."""
        is_seen = places < self.limits[..., None]
        if self.own_firsts is None or self.own_ends is None:
            return is_seen
        return is_seen | ((places >= self.own_firsts[..., None]) & (places < self.own_ends[..., None]))


class HeadStatistics(NamedTuple):
    """What a row's logits say, the banned token left out; all [R], float32 but for `best`."""

    best: Tensor
    """int64: the most probable token, the lowest index among equals."""
    best_logit: Tensor
    log_sum_exp: Tensor
    second_logit: Tensor
    """The next logit; the same as `best_logit` if two are equal."""
    entropy: Tensor
    """In nats."""


def has_kernels_for(head_size: int) -> bool:
    """Whether Triton's kernels take heads of this size: 16, 32, 64, ..."""
    return head_size >= 16 and head_size & (head_size - 1) == 0


def multiply(rows: Tensor, weight: Tensor, update: LowRankUpdate | None = None) -> Tensor:
    """Return rows [R, K] times weight [N, K] transposed, in parts [P, R, N] to be added up; here P is 1.

    With an update, what it adds to the rows of its gate is in them; other rows are as without it, to the bit.
    """
    return _product(rows, weight, update)[None]


def multiply_gated(rows: Tensor, weight: Tensor, update: LowRankUpdate | None = None) -> Tensor:
    """Return SiLU(gate) * up, [R, N]; weight is [2N, K], the gate's rows first; an update comes before SiLU."""
    gate, up = _product(rows, weight, update).chunk(2, dim=-1)
    return F.silu(gate) * up


def _product(rows: Tensor, weight: Tensor, update: LowRankUpdate | None) -> Tensor:
    product = F.linear(rows, weight)
    return product if update is None else _updated(product, rows, update)


def _updated(product: Tensor, rows: Tensor, update: LowRankUpdate) -> Tensor:
    """Add the update to the product [R, N], in place, part by part; what it adds to rows outside its gate is zero."""
    reduced = torch.where(update.gate, F.linear(rows, update.reduce), 0.0)
    starts = (0, *update.ends)
    for start, end, part in zip(starts, update.ends, reduced.chunk(len(update.ends), dim=-1), strict=False):
        product[:, start:end].addmm_(part, update.expand[start:end].T)
    return product


def normalize(hidden: Tensor, parts: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return hidden [R, C] plus parts [P, R, C], if there are any, and its RMSNorm; both [R, C] in hidden's dtype."""
    if parts is not None:
        hidden = (hidden.float() + parts.float().sum(0)).to(hidden.dtype)
    exact = hidden.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return hidden, (normed * weight.float()).to(hidden.dtype)


def rotate_and_store(
    parts: Tensor, bias: Tensor, angles: Tensor, rows: PassRows, keys: Tensor, values: Tensor
) -> Tensor:
    """Return the turned queries [B, T, H, E]; write the turned keys, and the values, to their places.

    Args:
        parts: [P, B * T, (H + 2G) * E], what `multiply` gave: queries, keys, values.
        bias: [(H + 2G) * E].
        angles: [2, positions, E / 2] float32, cosines and sines.
        keys: [slots, G, capacity, E], of one layer; so are values.
    """
    (B, T), (_, G, _, E) = rows.positions.shape, keys.shape
    heads = (parts.float().sum(0) + bias.float()).view(B, T, -1, E)
    cosine, sine = (table[rows.positions][:, :, None] for table in angles)  # [B, T, 1, E / 2]
    first, second = heads[:, :, :-G].chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(keys.dtype)
    where = (rows.slots[:, None], slice(None), rows.places)
    keys[where] = turned[:, :, -G:]
    values[where] = heads[:, :, -G:].to(values.dtype)
    return turned[:, :, :-G]


def attend_slots(query: Tensor, keys: Tensor, values: Tensor, rows: PassRows) -> Tensor:
    """Return what each row of query [B, T, H, E] reads at the places that it sees, in its slot; zeros if it sees none.

    Args:
        keys: [slots, G, capacity, E], of one layer; so are values.
    """
    is_seen = rows.sees(torch.arange(keys.shape[2], device=query.device))  # [B, T, capacity]
    keys, values = keys[rows.slots], values[rows.slots]
    output = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, is_seen[:, None], enable_gqa=True)
    return output.transpose(1, 2).masked_fill(~is_seen.any(-1)[..., None, None], 0.0)


def head_statistics(hidden: Tensor, head: Tensor, banned: int) -> HeadStatistics:
    """Return what the logits of hidden [R, C] say; head is [V, C]; float32 from the logits on."""
    logits = F.linear(hidden, head).float()
    logits[:, banned] = -torch.inf
    best_logit, best = logits.max(-1)
    second = logits.scatter(1, best[:, None], -torch.inf).amax(-1)
    log_sum_exp = logits.logsumexp(-1)
    probability = (logits - log_sum_exp[:, None]).exp()
    mean = torch.where(probability > 0, probability * logits, 0.0).sum(-1)
    return HeadStatistics(best, best_logit, log_sum_exp, second, log_sum_exp - mean)
