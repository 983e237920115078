"""Numbers in Markdown pages: what stands between two comments is written from the rows that the first one names.

    <!-- report: accuracy rows=rows/g20*.json,rows/ar.json -->
    (written by `make reports`)
    <!-- end of report -->

A comment names a part, such as a table, and its options; paths are relative to the page. All else on a page is prose,
which stays as it is.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration import calibration_caption, calibration_lines, draw_calibration  # beside this file
from significance import reference_of, significance_lines

from fastdllm.evaluation.plots import draw_accuracy, drawn_from, rows_digest
from fastdllm.evaluation.results import BASELINES, Row, caption, markdown, place, read_row, table_lines
from fastdllm.runtime import write_text

SPEEDS = ("tokens/s", "decode tokens/s", *BASELINES)  # columns
END = "<!-- end of report -->"
PART = re.compile(
    r"<!-- report: (?P<maker>\S+)(?P<options>[^\n]*?) -->\n(?P<body>.*?)(?P<end><!-- end of report -->)", re.S
)
BEGIN = re.compile(r"<!-- report:.*")
TESTS = (
    "Won and lost: problems that the cell alone, or the reference alone, has right. p: exact McNemar where problems "
    "are right or wrong, else a paired bootstrap; intervals by Agresti and Min, or of the bootstrap. Tokens per "
    "forward: paired bootstrap over problems. Holm: corrected for the lines of the table."
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comment of a page."""

    page: Path
    options: Mapping[str, str]
    is_check: bool = False
    """Draw nothing: a figure that does not show its rows is an error."""

    def files(self, name: str = "rows") -> list[Path]:
        """Return the files that the patterns of an option match, joined by commas, each once, in their order.

        Raises:
            ValueError: no such option, or a pattern that matches nothing.
        """
        patterns = self.text(name).split(",")
        found = {pattern: sorted(self.page.parent.glob(pattern)) for pattern in patterns}
        for pattern, files in found.items():
            if not files:
                raise ValueError(f"{self.page}: {name}={pattern} matches no file in {self.page.parent}; mend it there.")
        return list(dict.fromkeys(file for files in found.values() for file in files))

    def text(self, name: str) -> str:
        """Return the value of an option. Raises ValueError: it is not given."""
        if name not in self.options:
            raise ValueError(
                f"{self.page}: a report needs {name}=..., got {dict(self.options)}; add it to the comment."
            )
        return self.options[name]

    def rows(self) -> list[Row]:
        """Return the evaluation rows of `rows`, in the order of tables."""
        rows = [read_row(file) for file in self.files()]
        return sorted((row for row in rows if row is not None), key=place)

    def figure(self, rows: Any, draw: Callable[[Path], object], words: str) -> str:
        """Return the Markdown of the figure that the option file names, drawn now unless it shows these rows already.

        Raises:
            ValueError: it does not show them, and nothing is to be drawn.
        """
        file = self.page.parent / self.text("file")
        if drawn_from(file) != rows_digest(rows):
            if self.is_check:
                raise ValueError(f"{file} was not drawn from the rows that {self.page} names; run `make reports`.")
            draw(file)
        return f"![{words}]({self.text('file')})"

    @property
    def is_mixed(self) -> bool:
        """Whether rows of several revisions may stand in one table: with the option mixed=yes."""
        return self.options.get("mixed") == "yes"


@dataclass(frozen=True, kw_only=True)
class Maker:
    """How a kind of part is written."""

    make: Callable[[Part], str]
    """Part -> Markdown."""
    options: frozenset[str]
    """Names of the options that it reads."""


def accuracy(part: Part) -> str:
    """Return rows of evaluations as a table with its caption.

    Options: rows, mixed=yes, and speeds=no for rows that were measured beside other work on the same device.
    """
    rows = part.rows()
    lines = table_lines(rows, part.is_mixed)
    shown = [n for n, name in enumerate(lines[0]) if part.options.get("speeds") != "no" or name not in SPEEDS]
    return f"{markdown([[line[number] for number in shown] for line in lines])}\n\n{caption(rows)}"


def significance(part: Part) -> str:
    """Return the paired differences of all rows from one. Options: rows; against: the reference's file."""
    rows = [row for row in part.rows() if row["config"].get("repeat", 1) == 1]
    (against,) = part.files("against")
    reference = reference_of(rows, cell=against.stem)
    lines = significance_lines(rows, reference)
    return f"{markdown(lines)}\n\nAgainst {against.stem}, {reference['num_samples']} problems. {TESTS}"


def accuracy_figure(part: Part) -> str:
    """Draw accuracy against both speeds, unless the figure shows these rows already. Options: rows, file, mixed=yes."""
    rows = [row for row in part.rows() if row["tokens_per_forward"] is not None]
    words = "accuracy against tokens per forward pass and tokens per second"
    return part.figure(rows, lambda file: draw_accuracy(rows, file, part.is_mixed), words)


def calibration(part: Part) -> str:
    """Return a row of calibration as a table with its caption. Option: rows, one file."""
    row = _only_row(part)
    total = sum(row["position_tokens"]) / sum(row["position_passes"])
    runs = [f"{100 * row[name]['accuracy']:.1f} % of problems right" for name in ("one_token", "parallel")]
    facts = (
        f"One token per step: {runs[0]}; threshold {row['threshold']:g}: {runs[1]}, {total:.2f} tokens per forward, "
    )
    facts += "those after the stop included."
    return f"{markdown(calibration_lines(row))}\n\n{calibration_caption(row)} {facts}"


def calibration_figure(part: Part) -> str:
    """Draw a row of calibration. Options: rows, one file; file."""
    row = _only_row(part)
    words = "share of proposals that are right by confidence; tokens per forward by place in the block"
    return part.figure(row, lambda file: draw_calibration(row, file), words)


def _only_row(part: Part) -> Row:
    files = part.files()
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{part.page}: a report of calibration shows one row, got {len(files)} ({names}); name one.")
    return json.loads(files[0].read_text())


MAKERS = {
    "calibration": Maker(make=calibration, options=frozenset({"rows"})),
    "calibration_figure": Maker(make=calibration_figure, options=frozenset({"rows", "file"})),
    "accuracy": Maker(make=accuracy, options=frozenset({"rows", "mixed", "speeds"})),
    "significance": Maker(make=significance, options=frozenset({"rows", "against"})),
    "accuracy_figure": Maker(make=accuracy_figure, options=frozenset({"rows", "file", "mixed"})),
}


def render(page: str | Path, makers: Mapping[str, Maker] = MAKERS, *, is_check: bool = False) -> str:
    """Return the page as its rows want it; figures that do not show their rows are drawn.

    Raises:
        ValueError: a comment without end, of an unknown kind, or with options that it does not read; with `is_check` a
            figure that does not show its rows, which is then not drawn.
    """
    page = Path(page)
    text = page.read_text()
    begun, whole = len(BEGIN.findall(text)), len(PART.findall(text))
    if begun != whole or text.count(END) != whole:
        raise ValueError(
            f"{page} has {begun} comments `<!-- report: ... -->`, {text.count(END)} of `{END}`, and {whole} pairs of "
            "them, each on its own line; close every one."
        )

    def write(match: re.Match) -> str:
        maker, options = match["maker"], _options(page, match["options"])
        if maker not in makers:
            raise ValueError(f"{page}: no report is called {maker!r}; there are {', '.join(makers)}.")
        unknown = sorted(options.keys() - makers[maker].options)
        if unknown:
            known = ", ".join(sorted(makers[maker].options))
            raise ValueError(f"{page}: report {maker} reads no {', '.join(unknown)}; its options are {known}.")
        body = makers[maker].make(Part(page=page, options=options, is_check=is_check))
        return f"{match[0].splitlines()[0]}\n\n{body}\n\n{END}"

    return PART.sub(write, text)


def _options(page: Path, text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in text.split()]
    wrong = [name for name, equals, value in pairs if not (equals and value)]
    if wrong:
        raise ValueError(f"{page}: options of a report are name=value, without spaces, got {wrong[0]!r}.")
    return {name: value for name, _, value in pairs}


def pages(folder: str | Path) -> list[Path]:
    """Return the Markdown pages below a folder that have parts to write."""
    return [page for page in sorted(Path(folder).rglob("*.md")) if BEGIN.search(page.read_text())]


def write_reports(folder: str | Path, makers: Mapping[str, Maker] = MAKERS, *, is_check: bool = False) -> list[Path]:
    """Write every page below the folder from its rows, and return those that changed; with `is_check` write nothing.

    Raises: what `render` does. FileNotFoundError: no page has anything to write.
    """
    found = pages(folder)
    if not found:
        raise FileNotFoundError(f"no page below {folder} has a comment `<!-- report: ... -->`; name another folder.")
    changed = []
    for page in found:
        text = render(page, makers, is_check=is_check)
        if text != page.read_text():
            if not is_check:
                write_text(page, text)
            changed.append(page)
    return changed
