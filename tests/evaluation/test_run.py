import dataclasses
import json
from pathlib import Path

import forked
import pytest

from fastdllm import cli
from fastdllm.checkpoint import open_checkpoint
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.evaluation import run
from fastdllm.evaluation.config import AxesConfig, EvaluateConfig
from fastdllm.evaluation.outcomes import read_outcomes
from fastdllm.evaluation.results import ROW_FIELDS, read_rows
from fastdllm.evaluation.run import evaluate

from .rows import fake_row


def test_newest_export_is_taken_and_evaluated_on_its_task(adapted, project, capsys):
    rows = evaluate(EvaluateConfig(limit=2))
    printed = capsys.readouterr().out
    assert "runs/tried/export" in printed and "toy_problems" in printed
    path = project / "runs" / "tried" / "rows" / f"{rows[0]['cell']}.json"
    assert f"wrote {path.relative_to(project)}" in printed
    assert json.loads(path.read_text()) == rows[0]
    assert set(rows[0]) == set(ROW_FIELDS)
    assert rows[0]["num_samples"] == 2 and rows[0]["data_tokens"] == 123
    assert rows[0]["threshold"] == 0.8  # remembered
    assert rows[0]["subset"] is None and rows[0]["reuse_mode"] is None  # what does not apply
    assert set(rows[0]["accuracy_by_split"]) == {"a", "b"}
    samples = (project / "runs" / "tried" / "samples" / f"{rows[0]['cell']}.samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 and "response" in json.loads(samples[0])


def test_a_row_says_what_each_problem_got_and_how_busy_the_machine_was_and_tensorboard_has_it(adapted, project):
    row = evaluate(EvaluateConfig(max_new_tokens=33))[0]
    outcomes = read_outcomes(row)
    assert sum(outcomes.correct) / len(outcomes.correct) == row["accuracy"] and len(outcomes.correct) == 4
    assert sum(outcomes.tokens) == row["counted_tokens"]
    assert sum(outcomes.passes) == row["denoise_passes"] + row["append_passes"]
    assert row["load_average"] >= 0 and row["clock_mhz"] is None
    assert list((project / "runs" / "tried" / "cells" / row["cell"]).glob("events.out.tfevents*"))


def test_weights_that_were_let_go_of_are_read_again(adapted):
    checkpoint = open_checkpoint(adapted)
    first = checkpoint.qwen
    assert checkpoint.qwen is first
    checkpoint.release()
    assert checkpoint.qwen is not first
    checkpoint.release()
    checkpoint.release()  # nothing left


def test_plain_checkpoint_is_decoded_autoregressively_and_never_by_diffusion(plain):
    row = evaluate(EvaluateConfig(checkpoint=plain, task="toy_problems", limit=2))[0]
    assert row["mode"] == "ar" and row["data_tokens"] is None
    names = ("policy", "threshold", "reuse_k", "subset", "use_block_cache", "append_passes", "full_passes")
    assert all(row[name] is None for name in names)
    assert row["denoise_passes"] == row["counted_tokens"]
    with pytest.raises(ValueError, match="needs an adapted checkpoint"):
        evaluate(EvaluateConfig(checkpoint=plain, task="toy_problems", mode="diffusion"))
    for inert in ({"reuse_k": 2}, {"grid": True}, {"threshold": 0.5}, {"decode": DecodeConfig(sub_block_size=16)}):
        with pytest.raises(ValueError, match="mode ar"):
            evaluate(EvaluateConfig(checkpoint=plain, task="toy_problems", **inert))
    with pytest.raises(ValueError, match="remembers no task"):
        evaluate(EvaluateConfig(checkpoint=plain))


def test_transformers_engine_gives_the_same_answers_as_ours_in_ar_mode(plain, project):
    config = EvaluateConfig(checkpoint=plain, task="toy_problems", limit=2)
    rows = [evaluate(dataclasses.replace(config, engine=engine))[0] for engine in ("fastdllm", "transformers")]
    assert [row["engine"] for row in rows] == ["fastdllm", "transformers"]
    assert rows[0]["cell"] != rows[1]["cell"]
    files = [project / "runs" / "plain" / "samples" / f"{row['cell']}.samples.jsonl" for row in rows]
    answers = [[json.loads(line)["tokens"] for line in file.read_text().splitlines()] for file in files]
    assert answers[0] == answers[1]


def test_second_run_measures_nothing_and_force_measures_again(adapted, project, capsys):
    config = EvaluateConfig(limit=1, reuse_k=2, max_new_tokens=32)
    first = evaluate(config)[0]
    capsys.readouterr()
    assert evaluate(config) == [first]
    assert "0 of 1 measurements to run" in capsys.readouterr().out
    assert evaluate(dataclasses.replace(config, force="all"))[0]["seconds"] != first["seconds"]
    assert "forced" in capsys.readouterr().out
    assert len(read_rows(project / "runs" / "tried" / "rows")) == 1


def test_grid_makes_seven_rows_and_shows_nine_cells(adapted, capsys, measured):
    config = EvaluateConfig(grid=True)
    assert len(evaluate(config)) == 7
    capsys.readouterr()
    evaluate(dataclasses.replace(config, status=True))
    status = capsys.readouterr().out
    for name in (f"k{k}_{subset}" for k in (1, 2, 3) for subset in ("first", "middle", "last")):
        assert f"{name} " in status
    assert "7 of 7 measurements done" in status
    evaluate(dataclasses.replace(config, dry_run=True, force="k1_middle"))
    assert capsys.readouterr().out.count("would run") == 1
    with pytest.raises(ValueError, match="force names no cell here: k4_first"):
        evaluate(dataclasses.replace(config, force="k4_first"))


@pytest.fixture
def measured(monkeypatch):
    """The cells that were measured, without a model: their rows are made up."""
    cells = []

    def measure(cell, checkpoint, config, folder, revision):
        cells.append(cell)
        return fake_row(cell, checkpoint_hash=checkpoint.digest)

    monkeypatch.setattr(run, "measure", measure)
    return cells


def test_axes_and_repeats_run_in_order_are_shown_by_status_and_resumed(adapted, capsys, measured):
    config = EvaluateConfig(axes=AxesConfig(threshold=[0.7, 0.8], batch_size=[1, 32]), repeat=2)
    evaluate(dataclasses.replace(config, dry_run=True))
    planned = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("would run")]
    assert len(evaluate(config)) == 8
    assert [cell.name for cell in measured] == planned
    assert [cell.settings["repeat"] for cell in measured] == [1] * 4 + [2] * 4
    capsys.readouterr()
    evaluate(dataclasses.replace(config, status=True, repeat=3))
    assert "8 of 12 measurements done" in capsys.readouterr().out
    evaluate(dataclasses.replace(config, axes=AxesConfig(threshold=[0.7, 0.9], batch_size=[1, 32])))
    assert [cell.settings["threshold"] for cell in measured[8:]] == [0.9] * 4
    evaluate(dataclasses.replace(config, force=planned[2]))
    assert [cell.name for cell in measured[12:]] == [planned[2]]


def test_each_repeat_goes_once_through_all_checkpoints(adapted, plain, project, measured):
    axes = AxesConfig(checkpoint=[adapted, plain], task=["toy_problems"], threshold=[0.7, 0.8])
    rows = evaluate(EvaluateConfig(axes=axes, repeat=2, force="ar"))
    assert [(row["label"], row["threshold"]) for row in rows] == [
        ("tried", 0.7), ("tried", 0.8), ("plain", None), ("tried", 0.7), ("tried", 0.8), ("plain", None),
    ]  # fmt: skip
    assert [cell.settings["repeat"] for cell in measured] == [1] * 3 + [2] * 3
    assert [cell.settings["label"] for cell in measured] == ["tried", "tried", "plain"] * 2
    assert [len(read_rows(project / "runs" / name / "rows")) for name in ("tried", "plain")] == [4, 2]


def test_nothing_runs_if_one_value_cannot_be(adapted, measured):
    with pytest.raises(ValueError, match="must divide the block size"):
        evaluate(EvaluateConfig(axes=AxesConfig(sub_block_size=[8, 12])))
    assert not measured


def test_adaptive_reuse_reaches_the_engine_and_names_its_rows(adapted):
    config = EvaluateConfig(limit=1, decode=DecodeConfig(threshold=1.0), schedule="adaptive", reuse_mode="delta")
    none, much = evaluate(dataclasses.replace(config, axes=AxesConfig(budget=[0.0, 9.0])))
    assert "adaptive_0.0_first" in none["cell"] and "adaptive_9.0_first" in much["cell"]
    assert much["layers_run"] / much["denoise_passes"] < none["layers_run"] / none["denoise_passes"]


@pytest.mark.slow
def test_two_processes_measure_every_cell_once(adapted, project):
    argv = ["--limit", "1", "--max_new_tokens", "8", "--axes.threshold", "[0.7,0.9]", "--axes.reuse_k", "[1,2]"]
    logs = [project / f"{number}.out" for number in range(2)]
    processes = [forked.start(cli.run, EvaluateConfig, evaluate, argv, log=log) for log in logs]
    for process in processes:
        process.join()
    printed = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [0, 0], printed
    rows = read_rows(project / "runs" / "tried" / "rows")
    assert len(rows) == 4
    written = [Path(line.split()[1]).stem for line in printed.splitlines() if line.startswith("wrote ")]
    assert sorted(written) == sorted(row["cell"] for row in rows)


def test_another_policy_reaches_the_engine_and_names_its_row(adapted, project, capsys):
    decode = DecodeConfig(policy="fixed", policy_parameter=3, fuse_append=True)
    (row,) = evaluate(EvaluateConfig(checkpoint=str(adapted), decode=decode, limit=4, batch_size=2))
    assert (row["policy"], row["threshold"]) == ("fixed", None)
    assert "policy=fixed-policy_parameter=3.0-fuse_append=True" in row["cell"]
    assert "fixed 3" in capsys.readouterr().out
    (one,) = evaluate(
        EvaluateConfig(
            checkpoint=str(adapted), decode=DecodeConfig(policy="fixed", policy_parameter=1), limit=4, batch_size=2
        )
    )
    assert one["denoise_passes"] > row["denoise_passes"]
    with pytest.raises(ValueError, match="threshold 0.5 does nothing with decode.policy fixed"):
        EvaluateConfig(threshold=0.5, decode=decode)


def test_verified_answers_are_those_of_mode_ar_problem_by_problem(causal, project, capsys):
    decode = DecodeConfig(policy="verified", draft_length=4, draft_groups="0,4")
    (ours,) = evaluate(EvaluateConfig(checkpoint=causal, decode=decode, max_new_tokens=24))
    assert "verified, 4 drafts, groups 0,4" in capsys.readouterr().out
    (theirs,) = evaluate(EvaluateConfig(checkpoint=causal, mode="ar", max_new_tokens=24))
    assert (ours["policy"], ours["threshold"], ours["use_block_cache"], ours["append_passes"]) == (
        "verified",
        *[None] * 2,
        0,
    )
    texts = [
        [
            json.loads(line)["response"]
            for line in (project / "runs/causal/samples" / f"{row['cell']}.samples.jsonl").open()
        ]
        for row in (ours, theirs)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 4
    assert ours["denoise_passes"] <= theirs["denoise_passes"]
