"""The check that an evaluation survives kills: a short one passes, and a difference would be seen."""

import importlib
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kill_evaluation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("kill_evaluation")
    forked.ensure_server()  # instead of its own: one serves other tests too
    return module


@pytest.mark.slow  # starts the evaluation five times or more
def test_an_evaluation_killed_three_times_gives_the_row_and_the_samples_of_the_unbroken_one(
    kill_evaluation, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'benchmarks'}:{ROOT}")
    folder = tmp_path / "runs"
    kill_evaluation.check(kill_evaluation.KillConfig(kills=3, limit=12, device="cpu", output_dir=str(folder), seed=1))
    printed = capsys.readouterr().out
    assert printed.count("  kill ") == 3 and "3 kills" in printed and ", 0 differences" in printed
    expected = kill_evaluation.outcome(folder / "unbroken")
    assert len(expected) > 12 * 10
    changed = {**expected, "sample 0 response": "", "row accuracy": None}
    assert kill_evaluation.differences(expected, changed) == ["row accuracy", "sample 0 response"]


def test_a_folder_that_is_there_is_not_taken_for_fresh(kill_evaluation, tmp_path):
    with pytest.raises(ValueError, match="exists; remove it or name another"):
        kill_evaluation.check(kill_evaluation.KillConfig(output_dir=str(tmp_path)))
