"""Low-rank updates of merged matrices, added to some rows of a product: what a gated adapter is to the fused pass."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdllm.adapter import GatedLinear


class LowRankUpdate(NamedTuple):
    """What is added to a product with a merged matrix [N, K], whose S parts lie one below the other."""

    reduce: Tensor
    """[S * rank, K]: those of the parts, one below the other."""
    expand: Tensor
    """[N, rank], the adapter's scale in it; a part's rows take its own rank values."""
    ends: tuple[int, ...]
    """S numbers: where each part of N ends, the last one at N."""
    gate: Tensor | None = None
    """[R, 1] bool: the rows of a pass that it is added to; None outside a pass."""


class LayerUpdates(NamedTuple):
    """The updates of a layer's merged matrices; None where a matrix has none."""

    query_key_value: LowRankUpdate | None = None
    output: LowRankUpdate | None = None
    gate_up: LowRankUpdate | None = None
    down: LowRankUpdate | None = None

    def gated(self, gate: Tensor) -> "LayerUpdates":
        """Return the updates for a pass, in which `gate` [R, 1] bool says which rows are updated."""
        return LayerUpdates(*(None if update is None else update._replace(gate=gate) for update in self))


NO_UPDATES = LayerUpdates()


def layer_updates(layer: nn.Module) -> LayerUpdates:
    """Return the updates of a Qwen2 layer, as copies: what its gated linear layers hold, scaled."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerUpdates(
        query_key_value=_merged([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=_merged([attention.o_proj]),
        gate_up=_merged([mlp.gate_proj, mlp.up_proj]),
        down=_merged([mlp.down_proj]),
    )


def _merged(parts: list[nn.Module]) -> LowRankUpdate | None:
    """Return the update of the parts' merged matrix, in the base's dtype; zeros stand for a part without one."""
    gated = [part for part in parts if isinstance(part, GatedLinear)]
    if not gated:
        return None
    pairs = [_scaled(part, gated[0].rank) for part in parts]
    reduce, expand = (torch.cat(matrices).contiguous() for matrices in zip(*pairs, strict=True))
    return LowRankUpdate(reduce, expand, tuple(accumulate(len(expand) for _, expand in pairs)))


def _scaled(part: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    if isinstance(part, GatedLinear):
        dtype = part.base.weight.dtype
        expand = part.expand.detach().float() * (part.alpha / part.rank)
        return part.reduce.detach().to(dtype), expand.to(dtype)
    weight = part.weight
    return weight.new_zeros(rank, part.in_features), weight.new_zeros(part.out_features, rank)
