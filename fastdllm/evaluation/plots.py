"""Rows to figures: accuracy against tokens per forward pass and against tokens per second."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastdllm.evaluation.results import Row, caption, check_one_revision

AXES = (
    ("tokens_per_forward", "tokens per forward pass (tokens)"),
    ("tokens_per_second", "throughput (tokens/s)"),
)
SUBSET_MARKERS = {"first": "^", "middle": "s", "last": "v"}


def draw_accuracy(rows: Sequence[Row], path: str | Path, show_mixed_revisions: bool = False) -> Path:
    """Draw accuracy against both speeds, with the AR baseline as a dashed line, into a PNG; return its path.

    Raises:
        ValueError: no row, rows without speeds, or rows of mixed revisions.
    """
    rows = [row for row in rows if row["tokens_per_forward"] is not None]
    if not rows:
        raise ValueError("a figure needs at least one row that generated tokens, got none; evaluate first.")
    check_one_revision(rows, show_mixed_revisions)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (field, label) in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        _draw_axes(axes, rows, field)
        axes.set(xlabel=label, ylabel="accuracy (%)", ylim=(-3, 103))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7)
    figure.suptitle(caption(rows), fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw_axes(axes: Axes, rows: Sequence[Row], field: str) -> None:
    colours = {label: f"C{number}" for number, label in enumerate(dict.fromkeys(row["label"] for row in rows))}
    for row in rows:
        colour, is_baseline = colours[row["label"]], row["mode"] == "ar"
        if is_baseline:
            axes.axhline(100 * row["accuracy"], color=colour, linestyle="--", linewidth=1)
        axes.errorbar(
            row[field],
            100 * row["accuracy"],
            yerr=100 * row["accuracy_stderr"],
            color=colour,
            marker="*" if is_baseline else _marker(row),
            fillstyle="full" if (row["reuse_k"] or 1) < 3 else "none",
            markersize=9 if is_baseline else 6,
            label=f"{row['label']}: {_short(row)}",
        )
    axes.grid(alpha=0.3)


def _short(row: Row) -> str:
    if row["mode"] == "ar":
        return "AR baseline" if row["engine"] == "fastdllm" else f"AR baseline ({row['engine']})"
    if row["reuse_k"] and row["reuse_k"] > 1:
        return f"k{row['reuse_k']} {row['subset']}"
    return f"threshold {row['threshold']}"


def _marker(row: Row) -> str:
    """Return the marker of a row: by subset where layers are reused, a diamond for one token per pass, else a disc."""
    return SUBSET_MARKERS.get(row["subset"], "D" if row["threshold"] == 1.0 else "o")
