"""Keys and values of every slot: the exact block cache, and behind it the current block's own, approximate ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import memory_bytes

FREE_SHARE = 0.6  # of the free memory for keys and values; the rest is for what passes need


class SlotCache:
    """Preallocated keys and values [num_slots, G, places, E] of each layer; place p holds absolute position p.

    There are capacity + num_scratch + 1 places. Of each slot, those below its finished length are the block cache:
    exact, from prefill and append passes alone. The block_size places after them are the current block's own: denoising
    passes write them and later sub-block passes of the same block read them (the sub-block cache); the append pass
    overwrites them all with exact ones. Nothing else is ever visible, because every pass masks the places beyond its
    block.

    A verifying pass writes its clean rows' places behind the finished ones, and no row sees a place beyond its own; a
    rejected draft's place is written anew before any row may see it, since the next pass begins where it stood, or
    before. Its drafting rows have scratch places of their own, `num_scratch` from `capacity` on, which only rows of the
    same pass and group see. The last place, `dump`, is written by rows whose keys are not to be kept, and seen by none.
    """

    def __init__(self, model: BlockDiffusionLM, num_slots: int, capacity: int, num_scratch: int = 0):
        config = model.qwen.config
        shape = (model.num_layers, num_slots, config.num_key_value_heads, capacity + num_scratch + 1, head_size(model))
        self.capacity, self.dump = capacity, capacity + num_scratch
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)

    def select(self, slots: Tensor, places: Tensor, num_visible: int, sees_scratch: bool = False) -> None:
        """Say what the next pass writes, slots [R], places [R, T], and which of the `visible` places it sees."""
        self._slots, self._places, self._num_visible, self._sees_scratch = slots, places, num_visible, sees_scratch

    def visible(self, num_visible: int, sees_scratch: bool) -> Tensor:
        """Return the places 0 .. num_visible - 1, and behind them the scratch places if they are seen, [S] int64."""
        places = torch.arange(num_visible, device=self.keys.device)
        if not sees_scratch:
            return places
        return torch.cat([places, torch.arange(self.capacity, self.dump, device=self.keys.device)])

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write the fresh [R, G, T, E] keys and values; return the visible ones, [R, G, S, E]."""
        where = (self._slots[:, None], slice(None), self._places)
        self.keys[layer][where] = key.transpose(1, 2)
        self.values[layer][where] = value.transpose(1, 2)
        return self._seen(self.keys[layer]), self._seen(self.values[layer])

    def _seen(self, slab: Tensor) -> Tensor:
        seen = slab[self._slots, :, : self._num_visible]
        if not self._sees_scratch:
            return seen
        return torch.cat([seen, slab[self._slots, :, self.capacity : self.dump]], dim=2)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` places of one slot to another."""
        for kept in (self.keys, self.values):
            kept[:, target, :, :length] = kept[:, source, :, :length]


def head_size(model: BlockDiffusionLM) -> int:
    """Return E, the width of an attention head."""
    config = model.qwen.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes_per_place(model: BlockDiffusionLM) -> int:
    """Return the bytes that one place of one slot takes, keys and values over all layers."""
    groups = model.qwen.config.num_key_value_heads
    return 2 * model.num_layers * groups * head_size(model) * model.dtype.itemsize


class FittingSlots(NamedTuple):
    """How many slots a budget for keys and values has room for, and the numbers that say why no more."""

    num_slots: int
    """Beside the extra ones; below 1 if not one fits."""
    needed_bytes: int
    """Of one slot and the extra ones."""
    allowed_bytes: int
    most_tokens: int
    """The longest slot that would fit, in whole blocks."""


def fitting_slots(
    model: BlockDiffusionLM, capacity: int, num_scratch: int, extra: int, allowed_bytes: int | None
) -> FittingSlots:
    """Return how many slots of `capacity` and `num_scratch` places fit beside `extra` ones; None: into what is free."""
    allowed = int(FREE_SHARE * memory_bytes(model.device)) if allowed_bytes is None else allowed_bytes
    per_place, size = cache_bytes_per_place(model), model.block_size
    per_slot = (capacity + num_scratch + 1) * per_place
    most = (allowed // ((1 + extra) * per_place) - 1 - num_scratch) // size * size
    return FittingSlots(allowed // per_slot - extra, (1 + extra) * per_slot, allowed, max(most, 0))
