"""Pages are written from rows: what people wrote stays, numbers that were changed by hand do not."""

import json
from pathlib import Path

import pytest
from report import END, Maker, render, write_reports

from fastdllm.evaluation.results import write_row

from .rows import cell, fake_row
from .test_significance import packed

PAGE = f"""# What is it?

Words before.

<!-- report: accuracy rows=rows/*.json -->
{END}

<!-- report: accuracy_figure rows=rows/*.json file=figure.png -->
stale words
{END}
Words after.
"""


@pytest.fixture
def page(tmp_path):
    """A page beside three rows: one cell twice, and a baseline."""
    cells = [cell(mode="ar"), cell(), cell(repeat=2)]
    for one, correct in zip(cells, ([0, 1, 1, 0], [1, 1, 0, 1], [1, 1, 0, 1]), strict=True):
        outcomes = packed(correct, [5] * 4, [(5 - sum(correct), 0)] * 4)
        write_row(tmp_path / "rows", fake_row(one, outcomes=outcomes))
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md"


def test_tables_and_figures_are_written_and_words_stay(page):
    assert write_reports(page.parent) == [page]
    text = page.read_text()
    assert text.startswith("# What is it?\n\nWords before.\n\n<!-- report: accuracy rows=rows/*.json -->\n\n| model |")
    assert "| tiny | 1,000 | threshold 0.9, k1 (no reuse) | 75.0 % (30.1 to 95.4) | 2.00 |" in text
    assert "](figure.png)\n\n<!-- end of report -->\nWords after.\n" in text and "stale" not in text
    assert (page.parent / "figure.png").stat().st_size < 200_000


def test_a_second_time_changes_nothing_and_a_number_changed_by_hand_is_found_and_undone(page):
    write_reports(page.parent)
    text, drawn = page.read_text(), (page.parent / "figure.png").stat().st_mtime_ns
    assert write_reports(page.parent) == [] and (page.parent / "figure.png").stat().st_mtime_ns == drawn
    page.write_text(text.replace("75.0 %", "85.0 %"))
    assert write_reports(page.parent, is_check=True) == [page] and "85.0 %" in page.read_text()
    assert write_reports(page.parent) == [page] and page.read_text() == text


def test_another_row_draws_the_figure_anew_and_a_check_names_it_instead(page):
    write_reports(page.parent)
    before = (page.parent / "figure.png").read_bytes()
    write_row(page.parent / "rows", fake_row(cell(reuse_k=2), tokens_per_second=30.0))
    with pytest.raises(ValueError, match="figure.png was not drawn from the rows.*make reports"):
        render(page, is_check=True)
    assert (page.parent / "figure.png").read_bytes() == before
    render(page)
    assert (page.parent / "figure.png").read_bytes() != before


def test_significance_is_against_the_named_row_without_repeats(page):
    page.write_text(f"<!-- report: significance rows=rows/*.json against=rows/*-ar.json -->\n{END}\n")
    table = [line for line in render(page).splitlines() if line.startswith("|")]
    assert len(table) == 3 and "| +25.0 (" in table[2] and "| 2 | 1 | 1.000 | 1.000 |" in table[2]


def test_speeds_that_mean_nothing_can_be_left_out(page):
    page.write_text(f"<!-- report: accuracy rows=rows/*.json speeds=no -->\n{END}\n")
    assert "tokens/s" not in render(page) and "tokens per forward" in render(page)


@pytest.mark.parametrize(
    "line, message",
    [
        ("<!-- report: acuracy rows=rows/*.json -->", "no report is called 'acuracy'; there are .*accuracy"),
        ("<!-- report: accuracy rows=rows/none*.json -->", "rows=rows/none.*matches no file"),
        ("<!-- report: accuracy file=x.png rows=rows/*.json -->", "reads no file; its options are mixed, rows"),
        ("<!-- report: accuracy_figure rows=rows/*.json -->", "needs file="),
        ("<!-- report: accuracy rows -->", "name=value.*'rows'"),
        ("<!-- report: accuracy rows=rows/*.json", "1 comments.*close every one"),
        (f"<!-- report: accuracy rows=rows/*.json -->\n{END}\n{END}\n", "pairs of them.*close every one"),
        (f"{END}\n<!-- report: accuracy rows=rows/*.json -->\n", "pairs of them.*close every one"),
    ],
)
def test_a_comment_that_cannot_be_followed_is_an_error_that_says_why(page, line, message):
    page.write_text(f"{line}\n{END}\n")
    with pytest.raises(ValueError, match=message):
        render(page)


def test_rows_of_two_revisions_need_a_word_that_they_may_be_mixed(page):
    write_row(page.parent / "rows", fake_row(cell(reuse_k=2), revision="fedcba9876543210"))
    with pytest.raises(ValueError, match="one code revision"):
        render(page)
    page.write_text(f"<!-- report: accuracy rows=rows/*.json mixed=yes -->\n{END}\n")
    assert "fedcba9876" in render(page)


def test_a_folder_without_any_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has a comment"):
        write_reports(tmp_path)


def test_another_kind_of_part_is_one_function(page):
    makers = {"count": Maker(make=lambda part: str(len(part.files())), options=frozenset({"rows"}))}
    page.write_text(f"<!-- report: count rows=rows/*.json,rows/*ar.json -->\n{END}\n")
    assert render(page, makers).splitlines()[2] == "3"  # a file that two patterns match counts once
    assert json.loads(next(Path(page.parent, "rows").glob("*ar.json")).read_text())["mode"] == "ar"
