"""Rows to figures: accuracy against both speeds; training curves; the training mask."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from fastdllm.evaluation.events import CELLS
from fastdllm.evaluation.results import Row, caption, check_one_revision, repeats_of, when_reused
from fastdllm.evaluation.scoring import wilson_interval
from fastdllm.masks import CLEAN, dense_attention_mask, training_attention, training_rows

LOWEST = -3  # percent, where axes of accuracy begin
NOTE = "Rows"  # what a PNG calls the digest of the rows that it was drawn from
AXES = (
    ("tokens_per_forward", "tokens per forward pass (tokens)"),
    ("tokens_per_second", "throughput (tokens/s)"),
)
CURVES = (
    ("train/loss", "loss (nats per masked token)"),
    ("train/masked_accuracy", "masked accuracy"),
    ("train/accepted_length", "right drafts in a row (tokens)"),
    ("throughput/tokens_per_second", "throughput (data tokens/s)"),
)
SUBSET_MARKERS = {"first": "^", "middle": "s", "last": "v"}


def draw_accuracy(rows: Sequence[Row], path: str | Path, show_mixed_revisions: bool = False) -> Path:
    """Draw accuracy against both speeds, with the AR baseline as a dashed line, into a PNG; return its path.

    Repeats of a cell are one point, at their mean and with their range; accuracy has its 95 % interval. The grey line
    is the Pareto frontier: no cell is better in both than a cell on it.

    Raises:
        ValueError: no row, rows without speeds, or rows of mixed revisions.
    """
    rows = [row for row in rows if row["tokens_per_forward"] is not None]
    if not rows:
        raise ValueError("a figure needs at least one row that generated tokens, got none; evaluate first.")
    check_one_revision(rows, show_mixed_revisions)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    groups = repeats_of(rows)
    for axes, (field, label) in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        _draw_axes(axes, groups, field)
        axes.set(xlabel=label, ylabel="accuracy (%)", ylim=(LOWEST, 103))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7)
    figure.suptitle(caption(rows), fontsize=8)
    return save(figure, path, rows)


def save(figure: Figure, path: str | Path, rows: Any = None, dpi: int = 110) -> Path:
    """Write the figure as a PNG and return its path; its bytes depend on what is drawn, and on nothing else.

    Another version of matplotlib may draw other bytes; which rows a figure was drawn from can be read back
    (`drawn_from`).

    Args:
        rows: what it was drawn from, as JSON; None: not noted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    noted = {} if rows is None else {NOTE: rows_digest(rows)}
    figure.savefig(path, dpi=dpi, metadata={"Software": None, **noted})
    return path


def rows_digest(rows: Any) -> str:
    """Return 16 hex digits over rows, or whatever else a figure is drawn from."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(path: str | Path) -> str | None:
    """Return the digest of the rows that a figure was drawn from; None if it is not there or does not say."""
    if not Path(path).exists():
        return None
    with Image.open(path) as image:
        return image.info.get(NOTE)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points than which no other is at least as large in both numbers and larger in one, by the first."""
    return sorted({
        (x, y) for x, y in points if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    })  # fmt: skip


def _draw_axes(axes: Axes, groups: Sequence[Sequence[Row]], field: str) -> None:
    labels = dict.fromkeys(group[0]["label"] for group in groups)
    colours = {label: f"C{number}" for number, label in enumerate(labels)}
    points = [(_mean(group, field), 100 * _mean(group, "accuracy")) for group in groups]
    frontier = pareto(points)
    corners = [(min(speed for speed, _ in points), frontier[0][1]), *frontier, (frontier[-1][0], LOWEST)]
    axes.step(*zip(*corners, strict=True), where="pre", color="0.7", linewidth=3, zorder=0, label="Pareto frontier")
    for group, (speed, accuracy) in zip(groups, points, strict=True):
        row = group[0]
        colour, is_baseline = colours[row["label"]], row["mode"] == "ar"
        if is_baseline:
            axes.axhline(accuracy, color=colour, linestyle="--", linewidth=1)
        speeds = [one[field] for one in group]
        low, high = (100 * end for end in wilson_interval(accuracy / 100 * row["num_samples"], row["num_samples"]))
        axes.errorbar(
            speed,
            accuracy,
            xerr=[[max(0.0, speed - min(speeds))], [max(0.0, max(speeds) - speed)]],  # a mean is rounded
            yerr=[[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]],
            color=colour,
            marker="*" if is_baseline else _marker(row),
            fillstyle="full" if (row["reuse_k"] or 1) < 3 else "none",
            markersize=9 if is_baseline else 6,
            label=f"{row['label']}: {_short(row)}",
        )
    axes.grid(alpha=0.3)


def _mean(group: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in group) / len(group)


def _short(row: Row) -> str:
    if row["mode"] == "ar":
        return "AR baseline" if row["engine"] == "fastdllm" else f"AR baseline ({row['engine']})"
    if row["subset"]:
        return f"{when_reused(row)} {row['subset']}"
    return f"threshold {row['threshold']}"


def _marker(row: Row) -> str:
    """Return the marker of a row: by subset where layers are reused, a diamond for one token per pass, else a disc."""
    return SUBSET_MARKERS.get(row["subset"], "D" if row["threshold"] == 1.0 else "o")


def draw_curves(runs: Mapping[str, str | Path], path: str | Path) -> Path:
    """Draw loss, masked accuracy and throughput of training runs, by label, against document tokens into a PNG.

    Of runs that learn to draft also how many drafts in a row are right.

    Args:
        runs: label -> run folder, or a folder with TensorBoard's event file.
    Raises:
        FileNotFoundError: a folder without events.
    """
    logged = {label: read_scalars(folder) for label, folder in runs.items()}
    curves = [curve for curve in CURVES if any(curve[0] in scalars for scalars in logged.values())]
    figure = Figure(figsize=(4 * len(curves), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for label, scalars in logged.items():
        tokens = dict(scalars["data/tokens"])
        for axes, (tag, _) in zip(panels, curves, strict=True):
            points = [(tokens[step] / 1e6, value) for step, value in scalars.get(tag, []) if step in tokens]
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    for axes, (_, name) in zip(panels, curves, strict=True):
        axes.set(xlabel="document tokens (millions)", ylabel=name)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return save(figure, path, dpi=100)


def read_scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's scalars of a run as tag -> (optimizer step, value) in the order of steps.

    Raises:
        FileNotFoundError: no event file is below `folder`.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = sorted(Path(folder).rglob("events.out.tfevents*"))
    files = [file for file in found if CELLS not in file.relative_to(folder).parts]  # those are of evaluations
    if not files:
        raise FileNotFoundError(f"{folder} holds no TensorBoard events; give a run folder such as runs/demo.")
    scalars: dict[str, dict[int, float]] = {}
    for file in files:  # one file for each start of the run: what a later start repeats replaces the earlier value
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    return {tag: sorted(values.items()) for tag, values in scalars.items()}


def draw_attention_mask(path: str | Path, *, length: int = 16, block_size: int = 4) -> Path:
    """Draw who attends to whom in one training sample, from the predicate that training uses, into a PNG."""
    position = torch.arange(length)[None]
    rows = training_rows(torch.ones_like(position), position)
    predicate = training_attention(rows, block_size, "block")
    allowed = dense_attention_mask(predicate, 1, 3 * length, position.device)[0, 0].int()
    colours = allowed * (2 - (rows.half[0] == CLEAN).int())[None, :]  # 1 clean keys, 2 keys of the row's own view
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(colours.numpy(), cmap=ListedColormap(["#f4f4f4", "#3b6fb6", "#e08a2e"]))
    edges = [edge - 0.5 for edge in range(0, 3 * length + 1, block_size)]
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    centres = [length / 2 - 0.5 + part * length for part in range(3)]
    axes.set_xticks(centres, ["view a\n(masked)", "view b\n(the other tokens masked)", "clean"])
    axes.set_yticks(centres, ["view a", "view b", "clean"], rotation=90, va="center")
    axes.tick_params(which="both", length=0)
    for edge in (length - 0.5, 2 * length - 0.5):
        axes.axhline(edge, color="black", linewidth=1)
        axes.axvline(edge, color="black", linewidth=1)
    axes.set(xlabel="keys: orange inside the row's own block, blue the clean blocks before it", ylabel="rows")
    return save(figure, path)


if __name__ == "__main__":
    print(draw_attention_mask("docs/figures/mask.png"))
