"""Is a proposal right as often as it is sure, and where in a block do tokens come in parallel? Counts from traces.

Traces are those of the plain decoders (`benchmarks/calibrate.py` makes a row of them), of two decodings of a problem:

- One token per step (threshold 1.0). At each denoising step every masked place of the active sub-block has a proposal.
  It is **right** if it equals the token that this same decoding, going on from this state with one token per step,
  finally writes there. The proposal that the step accepts is right by definition; the others **wait**, and are what a
  lower threshold would accept besides. Places behind the end of the answer are left out.
- At a lower threshold. A denoising pass that unmasks n tokens counts as 1 / n pass for each of them, an append as one
  for the first token of its block; tokens over passes are the tokens per forward of a place, and over all places those
  of the run, tokens after the stop included.
"""

import textwrap
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastdllm.decoding.reference import Decoded
from fastdllm.evaluation.plots import save
from fastdllm.evaluation.scoring import wilson_interval

Row = dict[str, Any]
EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of the bins of confidence, each above its lower edge and up to its upper one."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One problem, decoded with a trace."""

    prompt_length: int
    decoded: Decoded

    @property
    def end(self) -> int:
        """The place behind the answer."""
        return self.prompt_length + len(self.decoded.tokens)


def confidence_counts(traces: Sequence[Traced]) -> dict[str, list[int]]:
    """Return what was proposed for places of the answers, one token per step, and what of it was right.

    Returns:
        proposals, right, waiting, waiting_right: a count for each bin between `EDGES`.
    """
    counts = {name: [0] * (len(EDGES) - 1) for name in ("proposals", "right", "waiting", "waiting_right")}
    for traced in traces:
        steps = traced.decoded.trace or []
        final = {c.place: c.token for step in steps for c in step if c.is_accepted}
        for candidate in (c for step in steps for c in step if c.place < traced.end):
            bin_number = bisect_left(EDGES, candidate.confidence) - 1
            is_right = candidate.token == final[candidate.place]
            counts["proposals"][bin_number] += 1
            counts["right"][bin_number] += is_right
            counts["waiting"][bin_number] += not candidate.is_accepted
            counts["waiting_right"][bin_number] += is_right and not candidate.is_accepted
    return counts


def position_counts(traces: Sequence[Traced], block_size: int) -> dict[str, list[float]]:
    """Return what each place of a block took.

    Returns:
        position_tokens: tokens unmasked or appended there.
        position_passes: passes, each shared by the tokens that it gave.
        position_steps: sum over its unmasked tokens of the number of the denoising step within the block, from 1 on.
    """
    tokens, passes, steps = [0] * block_size, [0.0] * block_size, [0] * block_size
    for traced in traces:
        tokens[0] += traced.decoded.append_passes  # each gives the first token of the next block
        passes[0] += traced.decoded.append_passes
        block, number = -1, 0
        for step in traced.decoded.trace or []:
            number = number + 1 if step[0].place // block_size == block else 1
            block = step[0].place // block_size
            accepted = [candidate.place % block_size for candidate in step if candidate.is_accepted]
            for position in accepted:
                tokens[position] += 1
                passes[position] += 1 / len(accepted)
                steps[position] += number
    return {"position_tokens": tokens, "position_passes": passes, "position_steps": steps}


def above(counts: Sequence[int], edge: int) -> int:
    """Return how many are above `EDGES[edge]`."""
    return sum(counts[edge:])


def calibration_lines(row: Row) -> list[list[str]]:
    """Return a header and a line for each edge: proposals above it, and how many of them are right, all text."""
    lines = [["confidence above", "proposals", "right", "waiting", "right"]]
    for edge, threshold in enumerate(row["edges"][:-1]):
        line = [f"{threshold:g}"]
        for count, right in (("proposals", "right"), ("waiting", "waiting_right")):
            number, good = above(row[count], edge), above(row[right], edge)
            line += [f"{number:,}", f"{100 * good / number:.2f} %" if number else "-"]
        lines.append(line)
    return lines


def calibration_caption(row: Row) -> str:
    """Return what was measured, on what, and what right means, in two sentences."""
    commit = f"{row['revision'][:10]}{'+' * row['is_dirty']}"
    cache = "with" if row["config"]["use_block_cache"] else "without"
    return (
        f"{row['label']}, {row['task']}, {row['num_samples']} problems, {row['device']}, {row['dtype']}, "
        f"{cache} sub-block cache, revision {commit}. Right: the token that decoding with one token per step from this "
        "state finally wrote there; waiting: not the one that the step accepted, which is right by definition."
    )


def draw_calibration(row: Row, path: str | Path) -> Path:
    """Draw a row of calibration into a PNG: how often proposals above a confidence are right, and tokens per forward
    at each place of the block."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    edges = row["edges"][:-1]
    left.plot([100 * edge for edge in edges], color="0.7", linestyle="--", label="the confidence itself")
    for name, good, label in (
        ("proposals", "right", "all proposals"),
        ("waiting", "waiting_right", "waiting: not the step's best"),
    ):
        counts = [(above(row[good], edge), above(row[name], edge)) for edge in range(len(edges))]
        places = [place for place, (_, number) in enumerate(counts) if number]
        shares = [100 * counts[place][0] / counts[place][1] for place in places]
        ends = [wilson_interval(*counts[place]) for place in places]
        lengths = zip(*((s - 100 * a, 100 * b - s) for s, (a, b) in zip(shares, ends, strict=True)), strict=True)
        bars = [[max(0.0, length) for length in side] for side in lengths]
        left.errorbar(places, shares, yerr=bars or None, marker="o", markersize=4, label=label)
    left.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges], fontsize=7)
    left.set(xlabel="confidence above", ylabel="right (%)", ylim=(-3, 103))
    left.legend(fontsize=7)
    per_place = [n / p if p else 0.0 for n, p in zip(row["position_tokens"], row["position_passes"], strict=True)]
    right.bar(range(len(per_place)), per_place)
    mean = sum(row["position_tokens"]) / sum(row["position_passes"])
    right.axhline(mean, color="black", linestyle="--", label=f"all places: {mean:.2f}")
    right.set(xlabel="place in the block", ylabel=f"tokens per forward pass at threshold {row['threshold']:g} (tokens)")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("\n".join(textwrap.wrap(calibration_caption(row), 190)), fontsize=7)
    return save(figure, path, row)
