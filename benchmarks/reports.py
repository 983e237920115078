"""Writes every number that stands between two comments of the experiments' pages, from the rows beside them.

    python benchmarks/reports.py          # make reports

What a comment may ask for: the parts of report.py and those of benchmarks, below. Pages whose
numbers came out of a program that keeps no rows have no comments. Run twice it changes nothing: a figure is drawn only
where it does not show its rows; delete it to have it drawn for another reason.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import decode_report  # beside this file
import lossless_report
import report
import reuse_table
from report import Maker, Part

from fastdllm.cli import run
from fastdllm.evaluation.results import markdown

LAYOUTS = ("published", "published_fast", "shared", "dead_rows", "ar")  # in the order of the table
THROUGHPUT_COLUMNS = (
    *("shape", "layout", "micro-batch", "data tokens/s", "rows/s", "rows per token", "MFU", "peak GB"),
    *("first steps s", "waiting for data"),
)
STRATEGY_COLUMNS = (
    "strategy",
    "GPUs",
    "tokens/s",
    "per GPU",
    "of one GPU",
    "peak GB",
    "losses of steps 1, 2, 3 and the last",
)
SOAK_FIELDS = {
    **{"requests": "requests", "tokens": "tokens answered", "evictions": "times memory ran out", "lost": "lost"},
    **{"doubled": "doubled", "different": "different", "ties": "ties"},
}


@dataclass(frozen=True, kw_only=True)
class ReportsConfig:
    """Write pages from rows."""

    folder: str = "experiments"
    """Folder whose Markdown pages are written, those below it too."""
    check: bool = False
    """Write nothing; exit with status 1 where a page or a figure does not show its rows."""


def throughput(part: Part) -> str:
    """Return rows of train_throughput.py as a table. Option: rows."""
    lines, rows = [list(THROUGHPUT_COLUMNS)], _read(part)
    shapes = [row["shape"] for row in rows]
    for row in sorted(rows, key=lambda row: (shapes.index(row["shape"]), LAYOUTS.index(row["layout"]))):
        passes = row["steps"] * row["config"]["accumulate"] * row["devices"]
        size = f"{row['micro_batch_size']} x {row['rows'] / passes / row['micro_batch_size']:,.0f} rows"
        facts = [row["shape"], f"`{row['layout']}`", size, f"{row['data_tokens_per_second']:,.0f}"]
        facts += [f"{row['rows_per_second']:,.0f}", f"{row['rows_per_token']:.2f}", f"{100 * row['mfu']:.1f} %"]
        facts += [
            f"{row['peak_memory_gb']:.1f}",
            f"{row['warmup_seconds']:.0f}",
            f"{100 * row['data_wait_share']:.2f} %",
        ]
        lines.append(facts)
    return markdown(lines)


def strategies(part: Part) -> str:
    """Return rows of train_throughput.py over several GPUs as a table. Options: rows; against: the row of one GPU."""
    one = [json.loads(file.read_text()) for file in part.files("against")] if "against" in part.options else []
    lines = [list(STRATEGY_COLUMNS)]
    for row in _read(part):
        speed = row["data_tokens_per_second"]
        share = f"{100 * speed / row['devices'] / one[0]['data_tokens_per_second']:.1f} %" if one else "-"
        losses = ", ".join(f"{loss:.4f}" for loss in (*row["losses"][:3], row["losses"][-1]))
        facts = [f"`{row['strategy']}`", str(row["devices"]), f"{speed:,.0f}", f"{speed / row['devices']:,.0f}", share]
        lines.append([*facts, f"{row['peak_memory_gb']:.1f}", losses])
    return markdown(lines)


def reuse(part: Part) -> str:
    """Return rows of reuse_table.py as a table. Option: rows."""
    return markdown(reuse_table.table(_read(part)))


def soak(part: Part) -> str:
    """Return the results of soak_decoding.py as a table. Option: rows."""
    lines = [list(SOAK_FIELDS.values())]
    for row in _read(part):
        counts = [len(row[name]) if name == "ties" else row[name] for name in SOAK_FIELDS]
        lines.append([f"{count:,}" for count in counts])
    return markdown(lines)


def _read(part: Part) -> list[dict]:
    return [json.loads(file.read_text()) for file in part.files()]


MAKERS = report.MAKERS | decode_report.MAKERS | lossless_report.MAKERS
MAKERS |= {
    "throughput": Maker(make=throughput, options=frozenset({"rows"})),
    "strategies": Maker(make=strategies, options=frozenset({"rows", "against"})),
    "reuse": Maker(make=reuse, options=frozenset({"rows"})),
    "soak": Maker(make=soak, options=frozenset({"rows"})),
}


def write(config: ReportsConfig) -> None:
    """Write the pages and say which of them changed."""
    changed = report.write_reports(Path(config.folder), MAKERS, is_check=config.check)
    for page in changed:
        print(f"{page} does not show its rows; run `make reports`." if config.check else f"wrote {page}")
    if not changed:
        print("every page shows its rows")
    elif config.check:
        raise SystemExit(1)


if __name__ == "__main__":
    run(ReportsConfig, write)
