import sys
from pathlib import Path

from fastdllm.demo import run as demo
from fastdllm.evaluation.results import Counts, make_row, ratios
from fastdllm.evaluation.scoring import score

ROOT = Path(__file__).parents[2]


def row(settings, **fields):
    counts = Counts(counted_tokens=60, denoise_passes=30, seconds=1.0)
    facts = {"cell": "x", "label": settings.checkpoint, "mode": "diffusion", "policy": "threshold", "threshold": 0.9}
    facts |= {"use_block_cache": True, "engine": "fastdllm", "revision": "abc", "is_dirty": False, "seconds": 1.0}
    facts |= {"counted_tokens": 60, "denoise_passes": 30, "reuse_k": 1}
    facts |= {"config": {name: getattr(settings, name) for name in ("checkpoint", "threshold", "grid")}}
    return make_row(**facts | ratios(counts) | score([1, 0], [None, None]) | fields)


def test_the_demo_measures_ar_the_fresh_adaptation_and_the_bundled_one_with_its_grid(tmp_path, monkeypatch, capsys):
    measured, trained, started, viewed = [], [], [], []

    def run_missing(config):
        measured.append(config)
        return [row(config)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, check: started.append(command))
    monkeypatch.setattr(demo, "parse", lambda kind, arguments: arguments)
    monkeypatch.setattr(demo, "train", trained.append)
    monkeypatch.setattr(demo, "run_missing", run_missing)
    monkeypatch.setattr(demo, "view", lambda config: viewed.append(config.sources))
    rows = demo.run_demo(demo.DemoConfig(limit=3))
    assert started == [[sys.executable, demo.PROBLEMS]] and (ROOT / demo.PROBLEMS).exists()
    assert trained == [["--config", "configs/demo.yaml"]]
    assert [(one.checkpoint, one.threshold, one.grid) for one in measured] == [
        ("data/tiny", 0.0, False),
        ("runs/demo/export", 0.9, False),
        ("data/tiny-adapted", 1.0, False),
        ("data/tiny-adapted", 0.9, True),
    ]
    assert {(one.run, one.task, one.limit, one.force) for one in measured} == {("runs/demo", "tiny_problems", 3, "")}
    assert {one.trace for one in measured} == {2} and viewed == [["runs/demo"]]
    assert len(rows) == 4 and (tmp_path / "runs/demo/figure.png").exists()
    demo.run_demo(demo.DemoConfig(limit=1))  # no more traces than problems
    assert {one.trace for one in measured[4:]} == {1}
    del measured[4:], trained[1:]
    demo.run_demo(demo.DemoConfig(fresh=True))
    assert trained[1] == ["--config", "configs/demo.yaml", "--fresh"]
    assert {(one.limit, one.force) for one in measured[4:]} == {(0, "all")}
    printed = capsys.readouterr().out
    assert "== 6/6" in printed and "tiny-adapted: data/tiny-adapted" in printed
