"""An evaluation that is broken off and started again gives the row and the samples of the unbroken one."""

import dataclasses
import json

import pytest

from fastdllm.evaluation import store as store_module
from fastdllm.evaluation.run import EvaluateConfig, evaluate
from fastdllm.evaluation.store import SampleStore

TIMES = ("seconds", "decode_seconds", "tokens_per_second", "decode_tokens_per_second", "load_average", "clock_mhz")


class Killed(BaseException):
    pass


def break_after(monkeypatch, number):
    """Let the process die when it has kept `number` samples."""
    add, left = SampleStore.add, [number]

    def add_or_die(store, *arguments, **options):
        if not left[0]:
            raise Killed
        left[0] -= 1
        add(store, *arguments, **options)

    monkeypatch.setattr(store_module.SampleStore, "add", add_or_die)


def outcome(folder, cell):
    row = json.loads((folder / "rows" / f"{cell}.json").read_text())
    samples = (folder / "samples" / f"{cell}.samples.jsonl").read_text()
    assert not list((folder / "samples").glob("*.partial.jsonl"))
    return {name: value for name, value in row.items() if name not in TIMES}, samples


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "toy_problems", "batch_size": 2},
        {"task": "toy_problems", "batch_size": 3, "mode": "ar"},
        {"task": "toy_problems", "batch_size": 3, "engine": "transformers"},
        {"task": "toy_letters", "batch_size": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_broken_off_and_started_again_gives_the_unbroken_row(adapted, plain, project, monkeypatch, changes):
    is_causal = "mode" in changes or "engine" in changes
    config = EvaluateConfig(checkpoint=plain if is_causal else adapted, max_new_tokens=0, label="toy", **changes)
    cell = evaluate(dataclasses.replace(config, run="runs/unbroken"))[0]["cell"]
    expected = outcome(project / "runs" / "unbroken", cell)
    broken = dataclasses.replace(config, run="runs/broken")
    partial = project / "runs" / "broken" / "samples" / f"{cell}.partial.jsonl"
    for kept in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            break_after(patch, kept)
            evaluate(broken)
        assert len(partial.read_text().splitlines()) >= 1 + kept
    evaluate(broken)
    assert outcome(project / "runs" / "broken", cell) == expected


def test_what_is_kept_is_not_answered_again_and_its_time_is_counted(adapted, project, monkeypatch):
    config = EvaluateConfig(task="toy_problems", batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_after(patch, 3)
        evaluate(config)
    (partial,) = (project / "runs" / "tried" / "samples").glob("*.partial.jsonl")
    header, *samples = [json.loads(line) for line in partial.read_text().splitlines()]
    slowed = [{**sample, "seconds": 1000.0, "sample": {**sample["sample"], "text": "9"}} for sample in samples]
    partial.write_text("".join(json.dumps(line) + "\n" for line in (header, *slowed)))
    row = evaluate(config)[0]
    assert 3000 < row["seconds"] < 3100
    written = (project / "runs" / "tried" / "samples" / f"{row['cell']}.samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in written].count("9") == 3


@pytest.mark.parametrize("changed", ["revision", "checkpoint_hash", "config_digest", "device", "versions"])
def test_samples_of_another_state_are_set_aside(adapted, project, monkeypatch, capsys, changed):
    config = EvaluateConfig(task="toy_problems", limit=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_after(patch, 1)
        evaluate(config)
    (partial,) = (project / "runs" / "tried" / "samples").glob("*.partial.jsonl")
    header, rest = partial.read_text().split("\n", 1)
    partial.write_text(json.dumps({**json.loads(header), changed: "another"}) + "\n" + rest)
    capsys.readouterr()
    evaluate(config)
    assert f"({changed} changed); set aside" in capsys.readouterr().out
    assert len(list((project / "runs" / "tried" / "samples").glob("*.partial.1.jsonl"))) == 1


def test_a_changed_prompt_is_answered_anew(adapted, project, monkeypatch):
    config = EvaluateConfig(task="toy_problems")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_after(patch, 3)
        evaluate(config)
    (partial,) = (project / "runs" / "tried" / "samples").glob("*.partial.jsonl")
    assert '["toy_problems", 1,' in partial.read_text()
    problems = project / "data" / "tiny" / "toy.jsonl"
    problems.write_text(problems.read_text().replace("3 + 3", "8 + 3"))
    row = evaluate(config)[0]
    written = (project / "runs" / "tried" / "samples" / f"{row['cell']}.samples.jsonl").read_text().splitlines()
    evaluate(dataclasses.replace(config, run="runs/anew"))
    anew = (project / "runs" / "anew" / "samples" / f"{row['cell']}.samples.jsonl").read_text().splitlines()
    assert "8 + 3" in written[1] and written == anew


def test_a_row_that_is_forced_again_does_not_take_the_samples_of_the_one_before(adapted, project, monkeypatch, capsys):
    config = EvaluateConfig(task="toy_problems", limit=2)
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):  # killed between the row and this
        patch.setattr(SampleStore, "remove", lambda store: store.path.with_name("gone").unlink())
        evaluate(config)
    assert evaluate(config)  # the row is there: nothing runs
    capsys.readouterr()
    evaluate(dataclasses.replace(config, force="all"))
    assert "(replaced_row changed); set aside" in capsys.readouterr().out
