"""How one sample was unmasked, pass by pass, as text and as a figure for TensorBoard."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastdllm.decoding.rows import Completion, Request
from fastdllm.decoding.trace import TraceStep, Unmasked
from fastdllm.model import BlockDiffusionLM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKED, NEWLINE = "░", "⏎"
THERE, ABSENT = "#d9dde2", "#ffffff"  # of cells: written in an earlier pass, still masked
WIDTH, HEIGHTS, DPI = 9.0, (3.0, 9.0), 80  # of the figure: inches, dots per inch


def can_draw() -> bool:
    """Return whether matplotlib is here, which comes with the extra eval."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True, kw_only=True)
class Unmasking:
    """What each pass wrote of one answer; what it wrote behind the answer's end is left out."""

    num_prompt_tokens: int
    num_tokens: int
    """Of the answer, stop token included."""
    block_size: int
    """Tokens; 1 where there are no blocks."""
    kinds: list[str]
    """What each pass was: trace.KINDS."""
    written: list[list[Unmasked]]
    """By each pass."""

    @classmethod
    def of(
        cls, model: BlockDiffusionLM, request: Request, completion: Completion, steps: Sequence[TraceStep]
    ) -> "Unmasking":
        """Return the unmasking of a request's answer from its recorded passes."""
        length, kinds = len(request.prompt), [step.kind for step in steps]
        end = length + completion.counted_tokens
        return cls(
            num_prompt_tokens=length,
            num_tokens=completion.counted_tokens,
            block_size=1 if {"token", "verify"} & set(kinds) else model.block_size,
            kinds=kinds,
            written=[[token for token in step.tokens if token.place < end] for step in steps],
        )

    @property
    def _size(self) -> str:
        return f"{self.num_tokens} tokens in {len(self.kinds)} passes"

    def describe(self) -> str:
        """Return Markdown, one line for each pass: its kind, how much it wrote, and the blocks that it wrote into."""
        legend = f"pass, kind, tokens written, the block afterwards: [new in this pass], {MASKED} masked"
        there, lines = {}, []
        for number, (kind, tokens) in enumerate(zip(self.kinds, self.written, strict=True), start=1):
            there |= {token.place: token.text.replace("\n", NEWLINE) for token in tokens}
            shown = self._blocks(there, {token.place for token in tokens})
            lines.append(f"{number:>4} {kind:<9} +{len(tokens):<3} {shown}".rstrip())
        return f"**{self._size}**; {legend}\n\n```\n" + "\n".join(lines) + "\n```"

    def _blocks(self, there: dict[int, str], new: set[int]) -> str:
        """Return the text of the blocks that hold a place of `new`; `there` are the texts of all unmasked places."""
        if not new:
            return ""
        size, end = self.block_size, self.num_prompt_tokens + self.num_tokens
        first = max(min(new) // size * size, self.num_prompt_tokens)
        places = range(first, min(max(new) // size * size + size, end))
        return "".join(f"[{there[place]}]" if place in new else there.get(place, MASKED) for place in places)

    def draw(self, title: str) -> "Figure":
        """Return a figure: place in the answer by pass; a token has the colour of its confidence where it is unmasked.

        Below that it is grey. So one token a pass makes a diagonal, and many at once a row.
        """
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure

        is_there = np.zeros((len(self.kinds), self.num_tokens))
        confidence = np.full(is_there.shape, np.nan)
        for number, tokens in enumerate(self.written):
            for token in tokens:
                place = token.place - self.num_prompt_tokens
                is_there[number:, place] = 1
                confidence[number, place] = token.confidence
        low, high = HEIGHTS
        figure = Figure(figsize=(WIDTH, min(max(low, 1 + 0.1 * len(self.kinds)), high)), layout="constrained", dpi=DPI)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        extent = (0.5, self.num_tokens + 0.5, len(self.kinds) + 0.5, 0.5)
        options = dict(aspect="auto", extent=extent, interpolation="nearest", vmin=0, vmax=1)
        axes.imshow(is_there, cmap=ListedColormap([ABSENT, THERE]), **options)
        cells = axes.imshow(confidence, cmap="viridis_r", **options)
        if self.block_size > 1:
            for edge in range(-self.num_prompt_tokens % self.block_size, self.num_tokens, self.block_size):
                axes.axvline(edge + 0.5, color="black", linewidth=0.6)
        axes.set(
            xlabel="place in the answer (tokens; lines begin blocks)",
            ylabel="forward pass",
            title=f"{title}: {self._size}",
        )
        figure.colorbar(cells, label="confidence when unmasked")
        return figure
