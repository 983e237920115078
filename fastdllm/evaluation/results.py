"""Rows: one measurement each, one JSON file each; written, read back and shown as tables.

A row holds its raw counters and, beside them, the ratios made from them by `ratios`; tests recompute the ratios.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastdllm.decoding.policies import VERIFIED
from fastdllm.evaluation.scoring import wilson_interval
from fastdllm.runtime import write_text

Row = dict[str, Any]
ROW_FIELDS = (
    *("cell", "label", "model", "checkpoint_hash", "data_tokens", "engine", "task", "metric", "likelihood", "mode"),
    *("policy", "threshold", "reuse_k", "subset", "reuse_mode", "use_block_cache", "sub_block_size", "batch_size"),
    *("num_samples", "accuracy", "accuracy_stderr", "accuracy_by_split", "metrics"),
    *("counted_tokens", "computed_tokens", "prefill_passes", "denoise_passes", "append_passes", "full_passes"),
    *("layers_run", "tokens_per_forward", "tokens_per_second", "decode_tokens_per_second", "seconds"),
    *("decode_seconds", "device", "clock_mhz", "load_average", "dtype", "revision", "is_dirty", "versions", "config"),
    *("config_digest", "outcomes"),
)
# Fields which rows from before them lack, with what was true then, None where it was not noted.
ADDED_FIELDS = dict.fromkeys(("likelihood", "clock_mhz", "load_average", "outcomes"))
COLUMNS = (
    *("model", "tokens seen", "decoding", "accuracy (95 %)", "tokens per forward", "tokens/s", "decode tokens/s"),
    *("of our AR", "of transformers' AR", "tokens counted", "computed"),
)
BASELINES = {"of our AR": "fastdllm", "of transformers' AR": "transformers"}  # column -> engine, in mode ar
VARYING_SETTINGS = (
    "task",
    "sub_block_size",
    "temperature",
    "max_new_tokens",
    "prompt",
    "batch_size",
    "device",
    "dtype",
)
REPEATED = ("checkpoint_hash", "num_samples", "device", "dtype", "revision", "is_dirty")  # the same in all repeats
# What a baseline has in common with a row beside which its speed is set, in the row and in its config.
SAME = ("task", "batch_size", "num_samples", "device", "dtype", "revision", "is_dirty")
SAME_SETTINGS = ("max_new_tokens", "prompt", "temperature")
SUBSET_ORDER = ("", "first", "middle", "last")
PIPE_WIDTH = 160  # columns where the output is no terminal


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one measurement ran; None where the engine or the task does not count it.

    Passes are counted per problem: a forward pass over a batch of n rows counts once for each of its n problems, so
    that a ratio does not depend on the batch size.
    """

    counted_tokens: int | None = None
    """New tokens through the first stop token of each problem."""
    computed_tokens: int | None = None
    """Every token unmasked, also those after the stop or beyond the limit."""
    prefill_passes: int | None = None
    denoise_passes: int | None = None
    """Denoising passes; in AR mode the single-token passes."""
    append_passes: int | None = None
    full_passes: int | None = None
    """Denoising passes over the whole block with all layers."""
    layers_run: int | None = None
    seconds: float
    """Wall time inside the engine, warm-up excluded; of a measurement that was killed and went on, the sum over its
    parts, each up to its last finished sample."""
    decode_seconds: float | None = None
    """`seconds` without prefill."""


def ratios(counts: Counts | Row) -> dict[str, float | None]:
    """Return the three ratios of a row from its raw counters; None where a counter does not apply."""
    raw = counts if isinstance(counts, dict) else asdict(counts)
    passes = None if raw["denoise_passes"] is None else raw["denoise_passes"] + (raw["append_passes"] or 0)
    return {
        "tokens_per_forward": _divide(raw["counted_tokens"], passes),
        "tokens_per_second": _divide(raw["counted_tokens"], raw["seconds"]),
        "decode_tokens_per_second": _divide(raw["counted_tokens"], raw["decode_seconds"]),
    }


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def make_row(**fields: Any) -> Row:
    """Return a row with every field of `ROW_FIELDS`, null where `fields` has none.

    Raises:
        ValueError: `fields` has a name that rows do not know.
    """
    unknown = sorted(set(fields) - set(ROW_FIELDS))
    if unknown:
        raise ValueError(f"a row has no field {', '.join(unknown)}; its fields are {', '.join(ROW_FIELDS)}.")
    return {name: fields.get(name) for name in ROW_FIELDS}


def write_row(folder: str | Path, row: Row) -> Path:
    """Write a row as `<folder>/<cell>.json`, aside and renamed into place; return its path."""
    path = Path(folder) / f"{row['cell']}.json"
    write_text(path, json.dumps(row, indent=2) + "\n")
    return path


def read_rows(folder: str | Path) -> list[Row]:
    """Return the rows of a folder: baselines first, then by model, threshold and reuse.

    Raises:
        ValueError: a file is not a row.
    """
    rows = [row for path in sorted(Path(folder).glob("*.json")) if (row := read_row(path)) is not None]
    return sorted(rows, key=place)


def place(row: Row) -> tuple:
    subset = row["subset"] or ""
    order = SUBSET_ORDER.index(subset) if subset in SUBSET_ORDER else len(SUBSET_ORDER)
    return row["mode"] != "ar", row["label"], -(row["threshold"] or 0), row["reuse_k"] or 1, order, row["cell"]


def read_row(path: str | Path) -> Row | None:
    """Return the row in a file, or None if there is no such file."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a row ({error}); delete it and evaluate again.") from None
    row = ADDED_FIELDS | row
    missing = [name for name in ROW_FIELDS if name not in row]
    if missing:
        raise ValueError(f"{path} lacks the row fields {', '.join(missing)}; delete it and evaluate again.")
    return row


def write_samples(path: Path, problems: Sequence[Row], completions: Mapping[tuple[str, int], Any]) -> None:
    """Write one JSON line per problem: prompt, response, answer, whether it is right, and what it took."""
    lines = []
    for problem in problems:
        done = completions.get((problem["task"], problem["doc_id"]))
        taken = {name: value for name, value in asdict(done).items() if name not in ("text", "index")} if done else {}
        lines.append(json.dumps({**problem, **taken}, default=str))
    write_text(path, "\n".join(lines) + "\n")


def check_one_revision(rows: Sequence[Row], show_mixed_revisions: bool = False) -> None:
    """Raise ValueError if the rows come from more than one state of the code, unless told to show them."""
    revisions = [revision(row) for row in rows]
    if len(set(revisions)) > 1 and not show_mixed_revisions:
        counts = ", ".join(f"{name}: {revisions.count(name)} rows" for name in sorted(set(revisions)))
        raise ValueError(
            f"a table needs rows of one code revision, got {counts}; measure all of them again, or show "
            "them as they are with --show_mixed_revisions."
        )


def revision(row: Row) -> str:
    """Return the short commit of a row, with a + where the working tree differed from it."""
    return f"{row['revision'][:10]}{'+' if row['is_dirty'] else ''}"


def _policy(row: Row) -> str:
    number = row["config"].get("policy_parameter")
    return row["policy"] if number is None else f"{row['policy']} {number:g}"


def describe_decoding(row: Row) -> str:
    """Return how a row was decoded, in the words of a table: `threshold 0.9, k2 first (output)`."""
    if row["likelihood"]:
        return f"log-likelihood, {row['likelihood']}"
    if row["mode"] == "ar":
        return "AR, token by token" if row["engine"] == "fastdllm" else f"AR, {row['engine']}"
    if row["policy"] == VERIFIED:
        length, groups = (row["config"][name] for name in ("draft_length", "draft_groups"))
        adapter = row["config"].get("adapter")
        said = f"verified, {length or 'chosen'} drafts" + (f", groups {groups}" if groups != "all" else "")
        return said + (f", adapter {adapter}" if adapter else "")
    parts = [f"threshold {row['threshold']}" if row["policy"] == "threshold" else _policy(row)]
    if row["reuse_k"] == 1:
        parts.append("k1 (no reuse)")
    else:
        parts.append(f"{when_reused(row)} {row['subset']} ({row['reuse_mode']})")
    if row["config"].get("active_rows") == "needed":
        parts.append("active rows needed")
    if not row["use_block_cache"]:
        parts.append("no sub-block cache")
    return ", ".join(parts)


def when_reused(row: Row) -> str:
    """Return the schedule of a row that reuses layers: `k2`, or `adaptive 0.1` with its budget."""
    is_adaptive = row["config"].get("schedule") == "adaptive"
    return f"adaptive {row['config']['budget']}" if is_adaptive else f"k{row['reuse_k']}"


def repeats_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows in groups that differ in `repeat` and in what was measured, in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        settings = {name: value for name, value in row["config"].items() if name != "repeat"}
        key = json.dumps([settings, *(row[name] for name in REPEATED)], sort_keys=True)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def table_lines(rows: Sequence[Row], show_mixed_revisions: bool = False) -> list[list[str]]:
    """Return a header and one line per row, all text; repeats of a cell are one line, with mean and spread.

    Raises ValueError for rows of mixed revisions.
    """
    check_one_revision(rows, show_mixed_revisions)
    groups = repeats_of(rows)
    firsts = [group[0] for group in groups]
    varying = {name: [row["config"].get(name) for row in firsts] for name in VARYING_SETTINGS}
    varying |= {"problems": [row["num_samples"] for row in firsts], "revision": [revision(row) for row in firsts]}
    varying = {name: values for name, values in varying.items() if len({*values} - {None}) > 1}  # else in the caption
    if len(rows) > len(groups):
        varying["repeats"] = [len(group) for group in groups]
    lines = [[*COLUMNS, *varying]]
    for number, group in enumerate(groups):
        row = group[0]
        tokens = "-" if row["data_tokens"] is None else f"{row['data_tokens']:,}"
        speeds = [_spread(group, "tokens_per_forward", 2)]
        speeds += [_spread(group, name) for name in ("tokens_per_second", "decode_tokens_per_second")]
        line = [row["label"], tokens, describe_decoding(row), _accuracy(group), *speeds]
        line += [_number(speed_up(group, baseline_of(group, groups, engine)), 2) for engine in BASELINES.values()]
        line += [_spread(group, name, 0) for name in ("counted_tokens", "computed_tokens")]
        lines.append(line + ["-" if values[number] is None else str(values[number]) for values in varying.values()])
    return lines


def _accuracy(group: Sequence[Row]) -> str:
    """Return the accuracy with its 95 % interval, or mean and range where repeats differ."""
    values = [100 * row["accuracy"] for row in group]
    if len(set(values)) > 1:
        return f"{sum(values) / len(values):.1f} % (repeats: {min(values):.1f} to {max(values):.1f})"
    low, high = wilson_interval(group[0]["accuracy"] * group[0]["num_samples"], group[0]["num_samples"])
    return f"{values[0]:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def baseline_of(group: Sequence[Row], groups: Sequence[Sequence[Row]], engine: str) -> Sequence[Row] | None:
    """Return the repeats of the AR baseline in `engine` that the group's speed may be set beside; None without one.

    It ran the same task with the same batch size, limits and revision on the same device. Of several models the one
    that has the group's weights counts; if none has, there is no telling, and no baseline.
    """

    def key(row: Row) -> list[Any]:
        return [row[name] for name in SAME] + [row["config"].get(name) for name in SAME_SETTINGS]

    row = group[0]
    found = [one for one in groups if (one[0]["mode"], one[0]["engine"]) == ("ar", engine) and key(one[0]) == key(row)]
    if len(found) > 1:
        found = [one for one in found if one[0]["checkpoint_hash"] == row["checkpoint_hash"]]
    return found[0] if len(found) == 1 else None


def speed_up(group: Sequence[Row], baseline: Sequence[Row] | None) -> float | None:
    """Return the mean tokens per second of a group over those of its baseline; None where either has none."""
    if baseline is None or None in [row["tokens_per_second"] for row in (*group, *baseline)]:
        return None
    own, other = (sum(row["tokens_per_second"] for row in rows) / len(rows) for rows in (group, baseline))
    return own / other


def _spread(group: Sequence[Row], name: str, decimals: int | None = None) -> str:
    """Return the value that all have, or `mean (least to most)`; "-" where one has none.

    Args:
        decimals: None: one, and none from 100 on.
    """
    values = [row[name] for row in group]
    if decimals is None:
        decimals = 1 if None in values or max(values) < 100 else 0
    if None in values or len(set(values)) == 1:
        return _number(None if None in values else values[0], decimals)
    mean = sum(values) / len(values)
    return f"{_number(mean, decimals)} ({_number(min(values), decimals)} to {_number(max(values), decimals)})"


def _number(value: float | None, decimals: int = 1) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def caption(rows: Sequence[Row]) -> str:
    """Return where and on what the rows were measured, in one line."""
    values = [sorted({str(row[name]) for row in rows}) for name in ("task", "metric", "device", "dtype", "batch_size")]
    task, metric, device, dtype, batch_size = [", ".join(each) for each in values]
    samples = ", ".join(str(number) for number in sorted({row["num_samples"] for row in rows}))
    commits = ", ".join(sorted({revision(row) for row in rows}))
    limits = sorted({row["config"].get("max_new_tokens") for row in rows} - {None})
    length = "".join(f", at most {number} new tokens" if number else ", lengths of the task" for number in limits)
    facts = f"{task} ({metric}), {samples} problems{length}, {device}, {dtype}, batch size {batch_size}"
    facts += f", revision {commits}"
    return facts + ("; repeats: mean (least to most)" if len(rows) > len(repeats_of(rows)) else "")


def print_table(rows: Sequence[Row], show_mixed_revisions: bool = False) -> None:
    """Print the rows on the terminal. Raises ValueError for rows of mixed revisions."""
    header, *lines = _without_empty(table_lines(rows, show_mixed_revisions))
    table = Table(caption=caption(rows))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in (0, 2) else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console = Console()
    Console(width=console.width if console.is_terminal else PIPE_WIDTH).print(table)


def _without_empty(lines: list[list[str]]) -> list[list[str]]:
    """Return the lines without the columns in which all are a dash: a terminal is narrow."""
    kept = [number for number in range(len(lines[0])) if {line[number] for line in lines[1:]} != {"-"}]
    return [[line[number] for number in kept] for line in lines]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a header and lines as a Markdown table."""
    head, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))
