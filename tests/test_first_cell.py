"""The study of what a first cell pays for: every cell is timed once cold and then `repeats` times, in one row."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_cells_are_timed_cold_and_then_repeat_by_repeat(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    first_cell = importlib.import_module("first_cell")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"question": "Tom has 12 pens. He buys 7 more. How many pens has he?"}) + "\n")
    first_cell.measure(
        first_cell.FirstCellConfig(
            checkpoint=str(ROOT / "data/tiny-adapted"),
            prompts=str(prompts),
            output=str(tmp_path / "row.json"),
            max_new_tokens=8,
            repeats=2,
        )
    )
    row = json.loads((tmp_path / "row.json").read_text())
    assert list(row["tokens_per_second"]) == ["eager layers", "the engine as it comes"]
    for cells in row["tokens_per_second"].values():
        assert list(cells) == ["k1_first", "k1_middle", "k1_last"]
        assert all(len(speeds) == 3 and min(speeds) > 0 for speeds in cells.values())
    printed = capsys.readouterr().out
    assert "| engine | cell | first time | repeat 1 | repeat 2 |" in printed and printed.count("k1_middle") == 2
