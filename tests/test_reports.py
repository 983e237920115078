"""The committed pages show the committed rows: a number in a table cannot be changed by hand.

Figures are compared by the digest of the rows that they were drawn from, which stands in them: their bytes may differ
between versions of matplotlib.
"""

import importlib
import re
from pathlib import Path

import pytest
from PIL import Image
from report import pages, render

ROOT = Path(__file__).parents[1]
PAGES = pages(ROOT / "experiments")


@pytest.fixture
def reports(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("reports")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT / "experiments")) for page in PAGES])
def test_a_committed_page_is_what_its_rows_give(page, reports):
    assert render(page, reports.MAKERS, is_check=True) == page.read_text(), "run `make reports`"


def test_every_experiment_has_such_a_page():
    folders = {page.relative_to(ROOT / "experiments").parts[0] for page in PAGES}
    assert folders == {path.name for path in (ROOT / "experiments").iterdir() if path.is_dir()}


def test_no_row_names_a_folder_of_the_machine_that_it_was_measured_on():
    rows = [*(ROOT / "experiments").rglob("*.json"), *(ROOT / "data").rglob("rows/*.json")]
    assert rows and [row.name for row in rows if re.search(r'"/\w+/', row.read_text())] == []


def test_every_figure_is_a_small_png():
    figures = sorted((ROOT / "experiments").rglob("*.png"))
    assert figures and all(figure.stat().st_size < 200_000 for figure in figures)
    for figure in figures:
        with Image.open(figure) as image:
            assert image.format == "PNG"


def test_the_check_of_the_command_finds_a_changed_number(reports, tmp_path, capsys):
    soak = ROOT / "experiments/02_decode_speed/soak.json"
    (tmp_path / "soak.json").write_text(soak.read_text())
    page = tmp_path / "page.md"
    page.write_text("<!-- report: soak rows=soak.json -->\n<!-- end of report -->\n")
    reports.write(reports.ReportsConfig(folder=str(tmp_path)))
    assert "| 10,000 | 197,529 | 51 | 0 | 0 | 0 | 0 |" in page.read_text() and "wrote" in capsys.readouterr().out
    page.write_text(page.read_text().replace("| 0 |", "| 1 |"))
    with pytest.raises(SystemExit):
        reports.write(reports.ReportsConfig(folder=str(tmp_path), check=True))
    reports.write(reports.ReportsConfig(folder=str(tmp_path)))
    capsys.readouterr()
    reports.write(reports.ReportsConfig(folder=str(tmp_path), check=True))
    assert capsys.readouterr().out == "every page shows its rows\n"
