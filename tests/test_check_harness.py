"""The check that both commands answer alike: it passes on bundled data, and a difference would be seen."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check_harness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("check_harness")


@pytest.mark.slow  # starts both commands; lm-eval's indexes its own 14,000 tasks first
def test_both_commands_answer_alike(check_harness, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "both"
    config = check_harness.CheckConfig(tasks=["tiny_problems"], limit=4, output_dir=str(folder), batch_size=3)
    check_harness.check(config)
    printed = capsys.readouterr().out
    assert "4 problems, 4 of lm-eval's; 4 equal prompts, 4 equal responses, 4 equal scores; 4 different" in printed
    assert "fast_dllm_v2" in (folder / "tiny_problems" / "lm_eval.txt").read_text()
    with pytest.raises(ValueError, match="exists; remove it"):
        check_harness.check(config)


def test_differences_are_found(check_harness):
    ours = {("t", n): {"prompt": "p", "response": f"r{n}", "score": 1.0} for n in range(3)}
    assert not any(check_harness.compare(ours, dict(ours)).values())
    theirs = {**ours, ("t", 1): {"prompt": "p", "response": "r", "score": 0.0}, ("t", 3): ours["t", 2]}
    del theirs["t", 2]
    found = check_harness.compare(ours, theirs)
    assert found == {"prompt": [], "response": [("t", 1)], "score": [("t", 1)], "missing": [("t", 2), ("t", 3)]}
