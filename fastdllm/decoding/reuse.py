"""Reuse: which layers, or rows, may be left out of a denoising step, at which step, and what stands in for them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdllm.model import BlockDiffusionLM, Branch

ReuseMode = Literal["output", "output_by_layer", "delta", "attn"]
Schedule = Literal["fixed", "adaptive"]
ActiveRows = Literal["all", "needed"]
GATED_MODES = ("delta", "attn")


@dataclass(frozen=True, kw_only=True)
class ReuseConfig:
    """Which layers are reused, and when they are refreshed."""

    reuse_k: int = 1
    """Schedule fixed: refresh every k-th denoising step of a block, 1 or more; 1 means no reuse."""
    schedule: Schedule = "fixed"
    """fixed: by reuse_k; adaptive: when what goes into the subset has changed by `budget` (modes delta and attn)."""
    budget: float = 0.0
    """Schedule adaptive: a step reuses while the relative changes of the subset's input, measured at each step against
    the last refresh, add up to less; 0 or more, 0 means no reuse, 0.1 is small."""
    subset: str = "first"
    """Layers that may be reused: first, middle, last, or a list of indices such as 3,4,5."""
    reuse_mode: ReuseMode = "output"
    """What stands in for a reused layer. output: its output at the block's last full pass (the seed study's definition;
    its reuse steps repeat that pass's logits whatever the subset, so they run no layer); output_by_layer: the same by
    leaving out the subset alone; delta: what it added to its input when it last ran, so fresh input flows on; attn:
    what its attention added, with the MLP run anew."""

    active_rows: ActiveRows = "all"
    """Rows that a sub-block step computes; needed: those of masked places, those before them, and those of tokens that
    came since their keys and values were computed (TRIM). Not together with reused layers."""

    @property
    def is_adaptive(self) -> bool:
        return self.schedule == "adaptive"

    @property
    def is_on(self) -> bool:
        """Whether any step may reuse layers."""
        return self.is_adaptive or self.reuse_k > 1

    @property
    def is_trimmed(self) -> bool:
        return self.active_rows == "needed"

    def __post_init__(self):
        if self.reuse_k < 1:
            raise ValueError(f"reuse_k must be 1 or more, got {self.reuse_k}; 1 means no reuse.")
        if self.reuse_mode not in ReuseMode.__args__:
            raise ValueError(f"reuse_mode must be one of {', '.join(ReuseMode.__args__)}, got {self.reuse_mode!r}.")
        if self.schedule not in Schedule.__args__:
            raise ValueError(f"schedule must be one of {', '.join(Schedule.__args__)}, got {self.schedule!r}.")
        if self.active_rows not in ActiveRows.__args__:
            raise ValueError(f"active_rows must be one of {', '.join(ActiveRows.__args__)}, got {self.active_rows!r}.")
        if self.is_trimmed and self.is_on:
            raise ValueError("active_rows needed and reused layers do not go together; set reuse_k 1, schedule fixed.")
        if not self.is_adaptive and self.budget:
            raise ValueError(f"budget {self.budget} does nothing in schedule fixed; set schedule adaptive.")
        if self.is_adaptive:
            self._check_adaptive()

    def _check_adaptive(self) -> None:
        if self.reuse_k != 1:
            raise ValueError(f"reuse_k {self.reuse_k} does nothing in schedule adaptive; set budget alone.")
        if self.reuse_mode not in GATED_MODES:
            raise ValueError(
                f"schedule adaptive needs reuse_mode delta or attn, got {self.reuse_mode}: an output that is repeated "
                "does not depend on the input that adaptive looks at."
            )
        if not self.budget >= 0:
            raise ValueError(f"budget must be 0 or more, got {self.budget}; 0 means no reuse.")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that may be reused, none if reuse is off.

        Raises:
            ValueError: a subset that the model does not have, or in schedule adaptive one with no layer before it.
        """
        layers = layer_subset(num_layers, self.subset) if self.is_on else ()
        if self.is_adaptive and layers[0] == 0:
            raise ValueError(
                f"schedule adaptive looks at what the layers before the subset give, and subset {self.subset} begins "
                "at layer 0; leave layer 0 out."
            )
        return layers


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


def needed_rows(is_masked: Tensor, is_dirty: Tensor) -> Tensor:
    """Return the rows of a sub-block that a denoising step needs, [B, S] bool: masked, before a masked one, or dirty.

    By the token shift the row before a masked place gives its logits; the place before the sub-block does not count,
    because a sub-block step finds the first place unmasked. Source: method.md 5.5.
    """
    is_before = torch.cat([is_masked[:, 1:], torch.zeros_like(is_masked[:, :1])], dim=1)
    return is_masked | is_before | is_dirty


def row_bucket(count: int) -> int:
    """Return how many rows a pass over `count` active ones computes: a power of two up to 8, a multiple of 8 above."""
    return -(-count // 8) * 8 if count > 8 else 1 << max(count - 1, 0).bit_length()


class LayerStore:
    """Keeps what the reused layers gave for the current block of every slot, and stands in for them.

    Rows are slots of the engine: `select` says which slots and places the next pass is about, so nothing can be read
    for a row that it was not stored for. The last slot takes what is not to be kept.
    """

    def __init__(self, model: BlockDiffusionLM, config: ReuseConfig, num_slots: int):
        self.layers = config.layers(model.num_layers)
        self.mode = config.reuse_mode
        shape = (num_slots, model.block_size, model.qwen.config.hidden_size)
        self._stored = {layer: torch.zeros(shape, dtype=model.dtype, device=model.device) for layer in self.layers}

    def select(self, slots: Tensor, offsets: Tensor, *, is_reused: bool, is_full: bool) -> None:
        """Say what the next pass is: slots [R], block offsets of its rows [R, T], and what happens to the subset."""
        self._where = (slots[:, None], offsets)
        self._is_reused = is_reused
        self._keeps = is_full or self.mode != "output_by_layer"

    def run(self, layer: int, hidden: Tensor, attend: Branch, transform: Branch) -> Tensor:
        """Return the layer's output [R, T, C]: computed, and kept for later steps, or from what was kept."""
        if layer not in self._stored:
            middle = hidden + attend(hidden)
            return middle + transform(middle)
        stored = self._stored[layer]
        if self._is_reused and self.mode != "attn":
            kept = stored[self._where]
            return kept if self.mode == "output_by_layer" else hidden + kept
        attention = stored[self._where] if self._is_reused else attend(hidden)
        middle = hidden + attention
        after = middle + transform(middle)
        if self._keeps and not self._is_reused:
            stored[self._where] = {"output_by_layer": after, "delta": after - hidden, "attn": attention}[self.mode]
        return after


class GatedStore(LayerStore):
    """A layer store that decides for every slot, on the device, whether a denoising step reuses or refreshes.

    A step begins with the layers before the subset, which always run. What they give at the rows of the sub-block (the
    probe) is compared with what they gave there when the subset last ran; the relative changes add up, and the step
    reuses while their sum is below the budget. A refresh, as every full pass is one, starts the sum anew.
    Source: method.md 5.6; the sum as in TeaCache (arXiv 2411.19108), the probe as in first-block caching.
    """

    def __init__(self, model: BlockDiffusionLM, config: ReuseConfig, num_slots: int, sub_block_size: int):
        super().__init__(model, config, num_slots)
        self.first, self.budget = self.layers[0], config.budget
        width, options = model.qwen.config.hidden_size, {"dtype": model.dtype, "device": model.device}
        self._refreshed = torch.zeros(num_slots, model.block_size, width, **options)  # the probe at the last refresh
        self._change = torch.zeros(num_slots, dtype=torch.float32, device=model.device)  # summed since then
        self.waiting = torch.zeros(num_slots, sub_block_size, width, **options)
        """[num_slots, S, C]: hidden states before layer `first`, of steps whose other layers are still to be run."""

    def select(self, slots: Tensor, offsets: Tensor, *, is_reused: bool, is_full: bool) -> None:
        super().select(slots, offsets, is_reused=is_reused, is_full=is_full)
        if not is_reused:
            self._change.index_fill_(0, slots, 0.0)  # a plain assignment copies from the host, which no graph records

    def run(self, layer: int, hidden: Tensor, attend: Branch, transform: Branch) -> Tensor:
        if layer == self.first and not self._is_reused:
            self._refreshed[self._where] = hidden
        return super().run(layer, hidden, attend, transform)

    def decide(self, slots: Tensor, offsets: Tensor, hidden: Tensor) -> Tensor:
        """Keep the probe `hidden` [R, S, C] for the rest of the step; return whether each slot reuses, [R] bool.

        slots: [R]; offsets: [R, S], places in the block. Norms are float32, over all rows of a slot.
        """
        before = self._refreshed[slots[:, None], offsets].float()
        change = (hidden.float() - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))
        self.waiting[slots] = hidden
        self._change[slots] += change
        return self._change[slots] < self.budget


def make_store(model: BlockDiffusionLM, config: ReuseConfig, num_slots: int, sub_block_size: int) -> LayerStore | None:
    """Return what keeps the reused layers' results; None if nothing is reused, or no layer by itself (mode output).

    Layers of a store are run in two halves, which the fused pass rounds otherwise: without one, mode output gives the
    same numbers for any subset.
    """
    if config.is_adaptive:
        return GatedStore(model, config, num_slots, sub_block_size)
    return LayerStore(model, config, num_slots) if config.is_on and config.reuse_mode != "output" else None
