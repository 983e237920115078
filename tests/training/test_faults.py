"""Non-finite steps are skipped, counted and end training when they do not stop; bad input is named."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.kill_training import Program, read_state
from fastdllm.training.run import run_folder
from fastdllm.training.snapshots import read_snapshot, snapshot_folders
from training.conftest import ROOT

REFUSALS = (ValueError, FileNotFoundError, RuntimeError)
STRATEGIES = ["ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
POISON = str(ROOT / "tests" / "training" / "poison.py")


def poisoned(kind, steps, rank=0):
    return (POISON, "--poison", json.dumps({"kind": kind, "steps": steps, "rank": rank}))


def trained_state(folder):
    """Return weights and what AdamW keeps, without the learning rate, which goes on, and progress."""
    state = read_state(read_snapshot(folder))
    parts = ("exp_avg", "scoring", "module/", "fp32", "single_partition", "/state/")
    return {name: value for name, value in state.items() if any(part in name for part in parts)}


def skipped_steps(config):
    reader = EventAccumulator(str(run_folder(config) / "tensorboard"))
    reader.Reload()
    return [event.value for event in reader.Scalars("optim/skipped_steps")]


def check_one_skipped(config):
    """The third of four optimizer steps changed nothing, the others did."""
    states = [trained_state(folder) for folder in snapshot_folders(run_folder(config) / "checkpoints")]
    tensors = [{n: v for n, v in state.items() if isinstance(v, torch.Tensor)} for state in states]
    assert len(tensors) == 4 and len(tensors[0]) > 20
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[2].items())
    for before, after in ((0, 1), (2, 3)):
        assert any(not torch.equal(value, tensors[before][name]) for name, value in tensors[after].items())
    assert all(value.isfinite().all() for value in tensors[3].values())
    assert skipped_steps(config) == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_non_finite_step_changes_nothing_and_is_counted(make_config, kind):
    config = make_config(max_steps=4, checkpoint_every=1, keep_checkpoints=4)
    Program(config, poisoned(kind, [3])).finish()
    check_one_skipped(config)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_non_finite_step_of_one_process_is_skipped_by_all(make_config, strategy):
    config = make_config(max_steps=4, checkpoint_every=1, keep_checkpoints=4, devices=2, strategy=strategy)
    Program(config, poisoned("inf", [3], rank=1)).finish()
    check_one_skipped(config)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_twenty_skipped_steps_in_a_row_end_training(make_config, strategy):
    config = make_config(max_steps=60, devices=1 if strategy == "auto" else 2, strategy=strategy, checkpoint_every=50)
    program = Program(config, poisoned("nan", [3, *range(6, 60)], rank=config.devices - 1))
    with pytest.raises(RuntimeError, match=r"20 optimizer steps in a row .* up to step 25, .* indices 96 to 99"):
        program.finish()
