"""The drafting objective: windows of mask rows behind random places of a response predict the tokens after them.

Everything is a pure function of tensors and numbers. What a window sees is what it will see in decoding: the clean
tokens up to its anchor, and itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdllm.masks import FLEX_TILE, GROUP_SEES_BOTH_WAYS, SeenPlaces
from fastdllm.model import PassSize, forward_flops
from fastdllm.objective import SampleShape, Targets, sample_generator

WINDOW_SIZES = tuple(2**power for power in range(1, FLEX_TILE.bit_length()))
NO_ANCHOR = -1
PACKED_PLACES = 8  # documents begin at multiples of it; packing counts in them


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """What a gated adapter learns: to draft the tokens of a window at once."""

    window: int = 16
    """Mask rows of a window, and so tokens that can be drafted at a time; a power of two from 2 to 128."""
    rows_per_token: float = 1.0
    """Rows of windows for each place of a sample, above 0; each costs about twice what a place of clean text does."""
    decay: float = 1.0
    """Row j of a window has weight decay ** (j - 1) in the loss, in (0, 1]; 1 weighs all alike."""

    def __post_init__(self):
        if self.window not in WINDOW_SIZES:
            raise ValueError(f"draft.window must be a power of two from 2 to {FLEX_TILE}, got {self.window}; try 16.")
        if self.rows_per_token <= 0:
            raise ValueError(f"draft.rows_per_token must be above 0, got {self.rows_per_token}.")
        if not 0 < self.decay <= 1:
            raise ValueError(f"draft.decay must be in (0, 1], got {self.decay}.")

    @property
    def block_size(self) -> int:
        """What documents are padded to multiples of; windows start anywhere."""
        return PACKED_PLACES

    def num_windows(self, sample_length: int) -> int:
        """Return how many windows a sample has."""
        return max(1, round(self.rows_per_token * sample_length / self.window))

    def sample_shape(self, sample_length: int) -> SampleShape:
        """Return what a sample holds: clean rows, one for each token, and its windows' targets."""
        return SampleShape(sample_length, sample_length, self.num_windows(sample_length) * self.window)


class Windows(NamedTuple):
    """The mask rows of a batch, window by window, R of them in a sample."""

    position: Tensor
    """[B, R] int64, for the rotary angle: the anchor's and 1, 2, ..., window."""
    seen: SeenPlaces
    """Each [B, R]: the places of the row's document up to the anchor."""
    targets: Targets
    """Each [B, R]; a row predicts the token that stands one place after its own (token shift)."""


def draw_anchors(seed: int, index: int, is_response: Tensor, document: Tensor, num_windows: int) -> Tensor:
    """Draw the anchors of one sample's windows, a function of (seed, index) and the sample alone.

    An anchor is the last clean place that a window sees. The place after it holds a response token (in decoding: the
    one that verification has just given), and so does the one after that, which the window's first row predicts.

    Args:
        index: global sample index, counted over the whole run.
        is_response: [L] bool; document: [L] int64.
    Returns:
        [num_windows] int64, different places in rising order, NO_ANCHOR behind them where there are too few.
    """
    is_inside = (
        is_response[1:-1] & is_response[2:] & (document[:-2] == document[1:-1]) & (document[:-2] == document[2:])
    )
    places = is_inside.nonzero()[:, 0]
    chosen = torch.randperm(len(places), generator=sample_generator(seed, index))[:num_windows]
    anchors = torch.full((num_windows,), NO_ANCHOR)
    anchors[: len(chosen)] = places[chosen].sort().values
    return anchors


def draft_windows(batch: dict[str, Tensor], config: DraftConfig) -> Windows:
    """Return the mask rows of a batch: `tokens`, `document`, `position`, `is_response` [B, L] and `anchor` [B, W].

    A row whose target is beyond its document, or is no response, has weight 0; so has a window without an anchor, which
    sees itself alone.
    """
    B, L = batch["tokens"].shape
    anchor = batch["anchor"].repeat_interleave(config.window, dim=1)  # [B, R]
    number = torch.arange(anchor.shape[1], device=anchor.device) % config.window + 1  # of the row in its window
    is_real, anchor = anchor != NO_ANCHOR, anchor.clamp(min=0)
    target = anchor + number + 1
    is_inside, target = target < L, target.clamp(max=L - 1)
    read = {name: batch[name].gather(1, target) for name in ("tokens", "document", "is_response")}
    is_predicted = is_real & is_inside & read["is_response"]
    is_predicted = is_predicted & (read["document"] == batch["document"].gather(1, anchor))
    position = batch["position"].gather(1, anchor)
    weight = torch.where(is_predicted, config.decay ** (number - 1).float(), 0.0)
    seen = SeenPlaces(anchor - position, torch.where(is_real, anchor, anchor - position - 1))
    return Windows(position + number, seen, Targets(read["tokens"], weight, torch.ones_like(weight)))


def clean_places(position: Tensor) -> SeenPlaces:
    """Return what clean rows at `position` [B, L] of their documents see: the document's, up to their own."""
    place = torch.arange(position.shape[1], device=position.device).expand_as(position)
    return SeenPlaces(place - position, place)


class DraftSize(NamedTuple):
    """What a drafting pass computes, over all samples."""

    num_clean_rows: int
    num_window_rows: int
    num_clean_pairs: int | Tensor
    """(query, key) pairs that attention allows in a layer, for one head: of clean rows."""
    num_context_pairs: int | Tensor
    """The same of window rows with clean keys."""
    num_own_pairs: int
    """The same inside windows."""


def draft_size(clean: SeenPlaces, windows: Windows, window: int) -> DraftSize:
    """Return the size of the pass over these rows."""
    num_rows = windows.position.numel()
    pairs = [(places.last - places.first + 1).sum() for places in (clean, windows.seen)]
    seen_inside = window if GROUP_SEES_BOTH_WAYS else (window + 1) / 2
    return DraftSize(clean.first.numel(), num_rows, *pairs, int(num_rows * seen_inside))


def draft_flops(config, size: DraftSize, num_updates: int) -> int | Tensor:
    """Return the floating-point operations of a training pass, backward included, that its result depends on.

    Clean rows are computed once, in the last layer their keys and values alone. Of window rows the frozen weights are
    multiplied twice, forward and for the gradient of what went in; attention gives no gradient to clean keys.

    Args:
        config: Qwen2Config; num_updates: values of all low-rank matrices, each of which is multiplied three times.
    """
    rows = size.num_window_rows
    clean = PassSize(size.num_clean_rows, 0, size.num_clean_pairs, 0, 0)
    pairs = size.num_context_pairs + size.num_own_pairs
    windows = PassSize(rows, rows, pairs, pairs, rows)
    own = PassSize(0, 0, size.num_own_pairs, size.num_own_pairs, 0)  # the gradients of the windows' keys and values
    passes = forward_flops(config, clean) + 2 * forward_flops(config, windows) + forward_flops(config, own)
    return passes + 6 * rows * num_updates
