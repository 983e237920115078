"""Rows of lossless.py as tables."""

import json
from collections.abc import Sequence
from typing import Any

from report import Maker, Part  # beside this file

from fastdllm.evaluation.results import markdown

COLUMNS = ("policy", "batch", "tokens per forward", "tokens/s", "of own AR", "of transformers", "rows a token")
COLUMNS += ("equal answers", "largest margin")
ACCEPTANCE_COLUMNS = ("drafts", "tokens per forward", "accepted, given those before, by place")
Row = dict[str, Any]


def speed_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return heading and lines of the rows that have a speed."""
    return [list(COLUMNS), *(_speed_line(row) for row in rows)]


def acceptance_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return heading and lines of the rows of what was accepted."""
    facts = [(str(row["draft_length"]), f"{row['tokens_per_forward']:.2f}", row["accepted_by_place"]) for row in rows]
    return [list(ACCEPTANCE_COLUMNS), *([length, tokens, _shares(shares)] for length, tokens, shares in facts)]


def _speed_line(row: Row) -> list[str]:
    margins = [one["margin"] for one in row.get("differences", [])]
    length = row["draft_length"]
    return [
        row["policy"] if length is None else f"{row['policy']}, {length or 'chosen'} drafts",
        str(row["batch_size"]),
        f"{row['tokens_per_forward']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['speedup_over_own_ar']:.2f}",
        f"{row['speedup_over_transformers']:.2f}",
        f"{row['rows_per_token']:.1f}" if "rows_per_token" in row else "-",
        f"{row['equal']} of {row['compared']}" if "equal" in row else "-",
        f"{max(margins):.3f}" if margins else "-",
    ]


def _shares(shares: Sequence[float | None]) -> str:
    return " ".join("-" if share is None else f"{share:.2f}" for share in shares)


def lossless(part: Part) -> str:
    """Return the rows' two tables, as far as there are such rows, and where they were measured. Option: rows."""
    rows = [json.loads(file.read_text()) for file in part.files()]
    accepted = [row for row in rows if row["policy"] == "acceptance"]
    timed = [row for row in rows if row["policy"] != "acceptance"]
    order = {"transformers": 0, "ar": 1}
    timed.sort(key=lambda row: (row["batch_size"], order.get(row["policy"], 2), row["draft_length"] or 99))
    tables = [speed_table(timed)] * bool(timed) + [acceptance_table(accepted)] * bool(accepted)
    places = sorted({f"{row['device']}, {row['dtype']}, revision {row['revision'][:10]}" for row in rows})
    return "\n\n".join([*map(markdown, tables), "; ".join(places)])


MAKERS = {"lossless": Maker(make=lossless, options=frozenset({"rows"}))}
