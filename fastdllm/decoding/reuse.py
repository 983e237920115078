"""Layer reuse: which layers may be left out of a denoising step, at which step, and what stands in for them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ReuseMode = Literal["output", "delta"]


@dataclass(frozen=True, kw_only=True)
class ReuseConfig:
    """Which layers are reused, and how often they are refreshed."""

    reuse_k: int = 1
    """Refresh every k-th denoising step of a block, 1 or more; 1 means no reuse."""
    subset: str = "first"
    """Layers that may be reused: first, middle, last, or a list of indices such as 3,4,5."""
    reuse_mode: ReuseMode = "output"
    """What is kept: output, a layer's output at the block's last full pass (the seed study's definition, whose reuse
    steps repeat stale logits); delta, what the layer added to its input when it last ran, so fresh input flows on."""

    def __post_init__(self):
        if self.reuse_k < 1:
            raise ValueError(f"reuse_k must be 1 or more, got {self.reuse_k}; 1 means no reuse.")
        if self.reuse_mode not in ("output", "delta"):
            raise ValueError(f"reuse_mode must be output or delta, got {self.reuse_mode!r}.")


def layer_subset(num_layers: int, subset: str) -> tuple[int, ...]:
    """Return the indices of the layers that may be reused.

    With c = round(3n/7) of n layers: first = 1..c (layer 0 always runs), middle = n//2 - c//2 .. n//2 - c//2 + c - 1,
    last = n - c .. n - 1. Source: method.md 5.2 (28 layers: 1-12, 8-19, 16-27).

    Raises:
        ValueError: an unknown name, or an index that the model does not have.
    """
    count = round(3 * num_layers / 7)
    starts = {"first": 1, "middle": num_layers // 2 - count // 2, "last": num_layers - count}
    if subset in starts:
        return tuple(range(starts[subset], starts[subset] + count))
    try:
        layers = tuple(sorted({int(part) for part in subset.split(",")}))
    except ValueError:
        raise ValueError(f"subset must be first, middle, last or indices such as 3,4,5, got {subset!r}.") from None
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise ValueError(f"subset {subset!r} must name layers from 0 to {num_layers - 1}, the model's layers.")
    return layers


class LayerStore:
    """Keeps what the reused layers gave for the current block of every slot, and stands in for them.

    Rows are slots of the engine: `select` says which slots and positions the next pass is about, so nothing can be read
    for a row that it was not stored for.
    """

    def __init__(self, num_layers: int, config: ReuseConfig, num_slots: int, block_size: int):
        self.layers = frozenset(layer_subset(num_layers, config.subset)) if config.reuse_k > 1 else frozenset()
        self.mode = config.reuse_mode
        self._shape = (num_slots, block_size)
        self._stored: dict[int, Tensor] = {}  # layer -> [num_slots, D, C]

    def select(self, slots: Tensor, offsets: Tensor, *, is_reused: bool, is_full: bool) -> None:
        """Say what the next pass is: slots [R], block offsets of its rows [R, T], and what happens to the subset."""
        self._where = (slots[:, None], offsets)
        self._is_reused = is_reused
        self._keeps = is_full or self.mode == "delta"

    def recall(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return the stand-in for a reused layer's output, [R, T, C], or None: run the layer."""
        if not self._is_reused or layer not in self.layers:
            return None
        kept = self._stored[layer][self._where]
        return kept if self.mode == "output" else hidden + kept

    def store(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Keep a reused layer's output (full passes only) or what it added (every pass that runs it)."""
        if layer not in self.layers or not self._keeps:
            return
        if layer not in self._stored:
            self._stored[layer] = torch.zeros(*self._shape, after.shape[-1], dtype=after.dtype, device=after.device)
        self._stored[layer][self._where] = after if self.mode == "output" else after - before
