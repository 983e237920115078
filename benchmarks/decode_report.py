"""Rows of decode_speed.py: written, printed, and made into tables and a figure of results.md."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report import END, Maker, Part, render  # beside this file

from fastdllm.evaluation.plots import save
from fastdllm.evaluation.results import markdown
from fastdllm.runtime import write_text

Row = dict[str, Any]
ROW_FIELDS = (
    *("cell", "engine", "shape", "kind", "rows", "batch_size", "context", "ms_per_forward", "bandwidth_fraction"),
    *("bandwidth_fraction_of_read", "tokens_per_forward", "tokens_per_second", "tokens_per_second_decode"),
    *("first_token_seconds", "tokens", "passes", "peak_memory_gb", "repeats", "spread", "capture_seconds"),
    *("warmup_seconds", "copy_bytes_per_second", "read_bytes_per_second", "device", "revision", "is_dirty"),
    *("versions", "config", "layers_run", "rows_run"),
)
VERIFIED_FIELDS = ("speedup_over_own_ar", "speedup_over_transformers")  # of rows of policy verified, besides
PASS_COLUMNS = {  # field -> heading and form
    **{"shape": ("shape", ""), "kind": ("pass", ""), "rows": ("rows", ""), "batch_size": ("batch", "")},
    **{"context": ("context", ",d"), "ms_per_forward": ("ms", ".3f")},
    **{"bandwidth_fraction": ("of the floor", ".1%"), "bandwidth_fraction_of_read": ("of the read floor", ".1%")},
    **{"spread": ("spread", ".1%"), "peak_memory_gb": ("peak GB", ".1f"), "capture_seconds": ("capture s", ".1f")},
}
ANSWER_COLUMNS = {
    **{"shape": ("shape", ""), "engine": ("engine", ""), "batch_size": ("batch", "")},
    **{"tokens_per_forward": ("tokens per forward", ".2f"), "tokens_per_second": ("tokens/s", ",.0f")},
    **{"tokens_per_second_decode": ("without prefill", ",.0f"), "first_token_seconds": ("first token s", ".3f")},
    **{"ms_per_forward": ("ms a pass", ".2f"), "bandwidth_fraction": ("of the floor", ".1%")},
    **{"spread": ("spread", ".1%"), "repeats": ("repeats", ""), "peak_memory_gb": ("peak GB", ".1f")},
    **{"capture_seconds": ("capture s", ".1f")},
}
VERIFIED_COLUMNS = {
    **{"shape": ("shape", ""), "engine": ("drafts", ""), "batch_size": ("batch", "")},
    **{"tokens_per_forward": ("tokens per forward", ".2f"), "tokens_per_second": ("tokens/s", ",.0f")},
    **{"speedup_over_own_ar": ("of own AR", ".2f"), "speedup_over_transformers": ("of transformers", ".2f")},
    **{"ms_per_forward": ("ms a pass", ".2f"), "spread": ("spread", ".1%"), "repeats": ("repeats", "")},
}
COMMENT = "<!-- report: decode_speed"
RESULTS = f"""# 02 How fast is a decoding pass, and from which batch on is token by token faster?

**Command.** `python benchmarks/decode_speed.py`, then `--report`, which writes what stands between the comments.

{COMMENT} rows=rows/*.json -->
{END}

<!-- report: batches_figure rows=rows/*.json file=batches.png -->
{END}
"""


def make_row(**values: Any) -> Row:
    """Return a row with every field, null where nothing is given. Raises ValueError for a field unknown to rows."""
    names = ROW_FIELDS + (VERIFIED_FIELDS if values.get("kind") == "verified" else ())
    unknown = sorted(values.keys() - set(names))
    if unknown:
        raise ValueError(f"a row has no field {', '.join(unknown)}.")
    return {name: values.get(name) for name in names}


def write_row(folder: str | Path, row: Row) -> None:
    write_text(Path(folder) / f"{row['cell'].replace('/', '-')}.json", json.dumps(row, indent=1) + "\n")


def read_rows(files: Iterable[Path]) -> list[Row]:
    """Return the rows of files by shape, kind, engine, rows, batch and context."""
    rows = [make_row(**json.loads(path.read_text())) for path in files]
    order = ("shape", "kind", "engine", "rows", "batch_size", "context")
    return sorted(rows, key=lambda row: [row[name] for name in order])


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of passes and those of answers; those of reuse and of policy verified are neither."""
    answers = [row for row in rows if row["kind"] == "answers"]
    return [row for row in rows if row["kind"] not in ("answers", "reuse", "verified")], answers


def reuse_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return heading and lines for the rows of reuse, each against `none` of its shape and batch.

    Bounds: by layers, what a machine could gain that only reads weights; by rows, one that computes at a constant rate.
    Both leave out the LM head.
    """
    plain = {(row["shape"], row["batch_size"]): row for row in rows if row["engine"] == "none"}
    lines = [["shape", "reuse", "batch", "tokens/s", "spread", "gain", "bound by layers", "bound by rows"]]
    for row in rows:
        none = plain.get((row["shape"], row["batch_size"]))
        ratios = ["-"] * 3
        if none is not None:
            gain = row["tokens_per_second"] / none["tokens_per_second"]
            bounds = [none[name] / none["tokens"] / row[name] * row["tokens"] for name in ("layers_run", "rows_run")]
            ratios = [f"{ratio:.2f}" for ratio in (gain, *bounds)]
        facts = [row["shape"], row["engine"], str(row["batch_size"]), f"{row['tokens_per_second']:,.0f}"]
        lines.append([*facts, f"{row['spread']:.1%}", *ratios])
    return lines


def verified_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return heading and lines for the rows of policy verified."""
    return table(rows, VERIFIED_COLUMNS)


def add_speed_ups(rows: Sequence[Row]) -> list[Row]:
    """Set the speed of each row of policy verified beside those of the baselines at its shape and batch, if they are
    there; return these rows."""
    verified = [row for row in rows if row["kind"] == "verified"]
    baselines = {"speedup_over_own_ar": "fastdllm_ar", "speedup_over_transformers": "transformers"}
    speeds = {
        (row["engine"], row["shape"], row["batch_size"]): row["tokens_per_second"]
        for row in rows
        if row["kind"] == "answers"
    }
    for row in verified:
        for name, engine in baselines.items():
            speed = speeds.get((engine, row["shape"], row["batch_size"]))
            row[name] = None if speed is None else row["tokens_per_second"] / speed
    return verified


def pass_costs(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return the milliseconds of verifying passes by all their rows, for each shape, as drafts.PASS_COSTS has them."""
    costs: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["kind"] == "verify":
            pair = row["rows"] * row["batch_size"], round(row["ms_per_forward"], 3)
            costs.setdefault(row["shape"], []).append(pair)
    return {shape: sorted(pairs) for shape, pairs in costs.items()}


def table(rows: Sequence[Row], columns: dict[str, tuple[str, str]]) -> list[list[str]]:
    """Return heading and lines; what does not apply is a dash."""
    lines = [
        ["-" if row[name] is None else format(row[name], form) for name, (_, form) in columns.items()] for row in rows
    ]
    return [[heading for heading, _ in columns.values()], *lines]


def print_rows(rows: Sequence[Row]) -> None:
    """Print passes, answers and reuse as tables of aligned columns."""
    for lines in tables(rows):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Return the tables of those kinds of cells that there are."""
    parts = zip(split(rows), (PASS_COLUMNS, ANSWER_COLUMNS), strict=True)
    made = [table(part, columns) for part, columns in parts if part]
    for kind, make in (("reuse", reuse_table), ("verified", verified_table)):
        found = [row for row in rows if row["kind"] == kind]
        made += [make(found)] if found else []
    return made


def write_report(folder: Path) -> None:
    """Write tables and figure into results.md beside the folder of rows; what else stands there stays.

    Raises:
        ValueError: there are no rows, or results.md has no comment for the tables or one that cannot be read.
    """
    if not list(folder.glob("*.json")):
        raise ValueError(f"{folder} holds no rows; measure first.")
    path = folder.parent / "results.md"
    if not path.exists():
        write_text(path, RESULTS)
    if COMMENT not in path.read_text():
        raise ValueError(f"{path} has no comment {COMMENT} ... -->, behind which the tables go; add it, and {END}.")
    write_text(path, render(path, MAKERS))
    print(f"wrote {path}")


def decode_speed(part: Part) -> str:
    """Return the caption and the tables of the rows. Option: rows."""
    rows = read_rows(part.files())
    return "\n\n".join([caption(rows), *map(markdown, tables(rows))])


def batches_figure(part: Part) -> str:
    """Draw the rows of answers, unless the figure shows them already. Options: rows, file."""
    answers = split(read_rows(part.files()))[1]
    if not answers:
        return "No answers are measured."
    return part.figure(answers, lambda file: draw_batches(answers, file), "tokens a second against batch")


MAKERS = {
    "decode_speed": Maker(make=decode_speed, options=frozenset({"rows"})),
    "batches_figure": Maker(make=batches_figure, options=frozenset({"rows", "file"})),
}


def caption(rows: Sequence[Row]) -> str:
    """Return where and on what the rows were measured."""
    devices = ", ".join(sorted({row["device"] for row in rows}))
    commits = ", ".join(sorted({f"{row['revision'][:10]}{'+' * row['is_dirty']}" for row in rows}))
    torch_versions = ", ".join(sorted({row["versions"]["torch"] for row in rows}))
    copy, read = (
        "{:.2f} to {:.2f}".format(*(choose(row[name] for row in rows) / 1e12 for choose in (min, max)))
        for name in ("copy_bytes_per_second", "read_bytes_per_second")
    )
    lengths = sorted({(row["config"]["prompt_tokens"], row["config"]["new_tokens"]) for row in split(rows)[1]})
    answers = ", ".join(f"{new} new tokens after {prompt}" for prompt, new in lengths)
    return (
        f"{devices}, torch {torch_versions}, revision {commits}. Copies {copy} TB/s, reads {read} TB/s; the floor is "
        f"the time to read weights and visible keys and values once at the rate of copies. Random weights; answers: "
        f"{answers or 'none'}, acceptance replayed. Spread: 10th to 90th percentile over the median."
    )


def crossover(diffusion: dict[int, float], autoregressive: dict[int, float]) -> float | None:
    """Return the batch at which AR becomes faster, between measured ones on the line in logarithms; None if nowhere.

    Args:
        diffusion, autoregressive: batch -> tokens per second.
    """
    sizes = sorted(diffusion.keys() & autoregressive.keys())
    gaps = [math.log(diffusion[size] / autoregressive[size]) for size in sizes]
    for index, (gap, following) in enumerate(zip(gaps, gaps[1:], strict=False)):
        if gap > 0 >= following:
            low, high = math.log(sizes[index]), math.log(sizes[index + 1])
            return math.exp(low + (high - low) * gap / (gap - following))
    return None


def draw_batches(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens a second against batch, one panel for each shape, the crossover of our two modes marked."""
    shapes = sorted({row["shape"] for row in rows})
    figure = Figure(figsize=(5.2 * len(shapes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    engines = sorted({row["engine"] for row in rows})
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        curves: dict[str, dict[int, float]] = {engine: {} for engine in engines}
        for row in rows:
            if row["shape"] == shape:
                curves[row["engine"]][row["batch_size"]] = row["tokens_per_second"]
        for number, (engine, curve) in enumerate(curves.items()):
            if curve:
                axes.plot(*zip(*sorted(curve.items()), strict=True), marker="o", color=f"C{number}", label=engine)
        crossing = crossover(curves.get("fastdllm", {}), curves.get("fastdllm_ar", {}))
        if crossing is not None:
            axes.axvline(crossing, color="black", linestyle=":", label=f"crossover at batch {crossing:.0f}")
        axes.set(xscale="log", yscale="log", xlabel="batch (sequences)", ylabel="tokens/s, prefill included")
        axes.set_title(shape, fontsize=9)
        sizes = sorted({row["batch_size"] for row in rows})
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, path, rows)
