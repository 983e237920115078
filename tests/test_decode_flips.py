"""The comparison of fused and plain passes: in float32 nothing flips; a wrong fused pass is seen."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def flips(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("decode_flips")


def compare(flips, tmp_path):
    questions = [
        f"Tom has {n} apples. He buys {n + 3} more apples. How many apples does Tom have now?" for n in (2, 14)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    flips.measure(
        flips.FlipsConfig(
            checkpoint=str(ROOT / "data/tiny-adapted"),
            prompts=str(prompts),
            max_new_tokens=40,
            dtype="float32",
            output=str(tmp_path / "flips.json"),
        )
    )
    return json.loads((tmp_path / "flips.json").read_text())


def test_in_float32_no_decision_of_the_fused_pass_differs(flips, tmp_path):
    result = compare(flips, tmp_path)
    assert result["candidates"] > 50 and result["answers"] == result["equal_answers"] == 2
    assert result["token_flips"]["count"] == result["accept_flips"]["count"] == 0


def test_a_wrong_fused_pass_is_seen(flips, tmp_path, monkeypatch):
    run = flips.FusedForward.__call__
    monkeypatch.setattr(flips.FusedForward, "__call__", lambda self, *arguments: run(self, *arguments).flip(-1))
    result = compare(flips, tmp_path)
    assert result["token_flips"]["count"] > 10
    assert max(result["token_flips"]["worst"]) == result["token_flips"]["worst"][0] > 0
