"""The form of the pages: links lead somewhere, named files exist, docs/ opens with questions and ends with the code.

And what tables say about the code is what the code does.
"""

import functools
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from lm_eval.utils import simple_parse_args_string
from pages import PAGES, ROOT, TOP_FOLDERS, anchors, links, page_name, places, spans

from fastdllm import runtime
from fastdllm.cli import parse
from fastdllm.decoding.policies import POLICIES
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Completion
from fastdllm.evaluation.arguments import parse_arguments
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.results import ROW_FIELDS

DOCS = [path for path in PAGES if ROOT / "docs" in path.parents]
MOST_LINES = 150
FORBIDDEN = {  # what only makes sense on one machine or in one conversation
    "a path of some machine": r"(?<![\w.~}/-])/(?:work|tmp|home|root|mnt|srv|Users)/",
    "a numbered task": r"(?i)\bissue \d",
    "who wrote it": r"(?i)\b(?:agent|helper|assistant session)s?\b",
}
MADE = ("data/prepared", "data/tiny-source", "runs", "logs")  # made by programs, ignored by git
TABLE_ROW = re.compile(r"^\| (.+) \|$", re.MULTILINE)


@functools.cache
def names() -> set[str]:
    """Return the names of all files that a page may call by their name alone."""
    return {path.name for folder in TOP_FOLDERS for path in (ROOT / folder).rglob("*.*")}


def faults(text: str, folder: Path) -> list[str]:
    """Return what is wrong with a page that lies in `folder`."""
    found = [f"{what}: {match[0]}" for what, pattern in FORBIDDEN.items() if (match := re.search(pattern, text))]
    for target in links(text):
        name, _, anchor = target.partition("#")
        path = folder / name if name else None
        if path is not None and not path.exists():
            found.append(f"link to nothing: {target}")
        elif anchor and anchor not in anchors(path.read_text() if path is not None else text):
            found.append(f"link to no heading: {target}")
    for place in places(text):
        if not (place.startswith(MADE) or place in names() or any((root / place).exists() for root in (ROOT, folder))):
            found.append(f"no such file: {place}")
    return found


def faults_of_form(text: str) -> list[str]:
    """Return what a page of docs/ lacks: its question first, the place of the code last, and shortness."""
    lines = text.rstrip().splitlines()
    found = [] if re.fullmatch(r"# .+\?", lines[0]) else ["opens with no question"]
    if len(lines) > MOST_LINES:
        found.append(f"{len(lines)} lines")
    _, marker, end = text.rpartition("Where the code is")
    if not marker or len(end.splitlines()) > 6 or not places(end):
        found.append("does not end with where the code is")
    return found


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_a_page_names_only_what_is_there(path):
    assert faults(path.read_text(), path.parent) == []


@pytest.mark.parametrize("path", DOCS, ids=page_name)
def test_a_page_of_docs_opens_with_its_question_and_ends_with_the_code(path):
    assert faults_of_form(path.read_text()) == []


def test_faults_are_found():
    text = (
        "# One\n[a](nowhere.md) [b](README.md#no-such-heading) `tests/gone.py`\nlog in /"
        + "tmp/x, Issue 7, the agent\n"
    )
    kinds = [fault.split(":")[0] for fault in faults(text, ROOT)]
    assert kinds == [*FORBIDDEN, "link to nothing", "link to no heading", "no such file"]
    assert faults_of_form("# One\n" + "x\n" * 150) == [
        "opens with no question",
        "151 lines",
        "does not end with where the code is",
    ]
    assert faults("[a](README.md#try-it-ten-minutes-on-a-laptop) `tests/pages.py`", ROOT) == []


def test_every_page_is_linked_from_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in links(index.read_text())}
    assert {path for path in DOCS if "_templates" not in path.parts} - {index} <= linked


def unfounded(text: str, folder: Path) -> list[str]:
    """Return the decimal and the large numbers in `text` that stand in none of the pages and rows it links to."""
    sources = "".join((folder / target).read_text() for target in links(text))
    numbers = re.findall(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+\.\d+)(?![\w,]*\d)", re.sub(r"\]\([^)]*\)", "]", text))
    return [number for number in numbers if not re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d)", sources)]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "concepts").glob("*.md")), ids=page_name)
def test_what_a_page_says_was_measured_stands_where_it_links_to(path):
    for section in re.findall(r"^## Measured\n(.*?)(?=^## |\Z)", path.read_text(), re.DOTALL | re.MULTILINE):
        assert unfounded(section, path.parent) == []


def test_a_verdict_s_numbers_stand_on_its_page():
    path = ROOT / "docs" / "experiments" / "README.md"
    verdicts = table("docs/experiments/README.md", "experiment")
    assert {row[0] for row in verdicts} and all(unfounded(" ".join(row), path.parent) == [] for row in verdicts)
    assert unfounded("[a](../README.md) 1.234567 and 98,765", ROOT / "docs" / "concepts") == ["1.234567", "98,765"]


def test_every_experiment_has_a_verdict():
    path = ROOT / "docs" / "experiments" / "README.md"
    linked = {(path.parent / target).resolve() for target in links(path.read_text())}
    assert set((ROOT / "experiments").rglob("*.md")) <= linked


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table whose header begins with `heading`, without header and rule."""
    text = (ROOT / page).read_text()
    start = re.search(rf"^\| {heading}.*\n\|[-| ]+\|\n", text, re.MULTILINE)
    assert start, f"{page} has no table that begins with {heading}"
    rows = text[start.end() :].split("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in TABLE_ROW.findall(rows)]


def test_the_table_of_gpus_says_the_dtype_that_is_picked(monkeypatch):
    rows = table("docs/STATUS.md", "GPU")
    assert len(rows) >= 7
    for _, _, capability, dtype, _ in rows:
        numbers = tuple(map(int, capability.split(".")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, numbers=numbers: numbers)
        assert str(runtime.get_optimal_dtype(torch.device("cuda"))[0]) == f"torch.{dtype}"


def test_a_strategy_s_model_argument_and_option_mean_the_same(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = table("docs/README.md", "strategy")
    assert len(rows) >= 6
    for _, argument, option, _ in rows:
        given = simple_parse_args_string(argument.strip("`"))
        arguments = parse_arguments({"use_block_cache": True} | given)  # the default of evaluate.py
        config = parse(EvaluateConfig, option.strip("`").split())
        reuse = {field.name: getattr(config, field.name) for field in fields(ReuseConfig)}
        assert ReuseConfig(**reuse) == arguments.reuse
        assert replace(config.decode, threshold=config.threshold or config.decode.threshold) == arguments.decode


def test_the_table_of_policies_has_every_policy_with_its_range():
    rows = {row[0].strip("`"): row for row in table("docs/concepts/policies.md", "policy")}
    assert set(rows) == set(POLICIES)
    for name, policy in POLICIES.items():
        usual, allowed = rows[name][2].split(", ", 1)
        assert (float(usual), allowed) == (policy.parameter_range.default, str(policy.parameter_range))


def test_every_field_of_a_row_is_explained():
    explained = [name for row in table("docs/reference/rows.md", "field") for name in spans(row[0])]
    assert sorted(explained) == sorted(ROW_FIELDS)
    names = {field.name for field in fields(Completion)} - {"text", "index"}
    assert names <= set(spans((ROOT / "docs/reference/rows.md").read_text()))
