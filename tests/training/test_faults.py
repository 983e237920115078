"""Non-finite steps are skipped, counted and end training when they do not stop; bad input is named."""

import dataclasses
import json

import pytest
import torch

from benchmarks.kill_training import Program, logged, read_state
from fastdllm.training.run import run_folder
from fastdllm.training.snapshots import read_snapshot, snapshot_folders
from training.conftest import ROOT

REFUSALS = (ValueError, FileNotFoundError, RuntimeError)
STRATEGIES = ["ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
PROBE = str(ROOT / "tests" / "training" / "probe.py")


def poisoned(kind, steps, rank=0):
    return (PROBE, json.dumps({"kind": kind, "steps": steps, "rank": rank}))


def trained_state(folder):
    """Return weights and what AdamW keeps, without the learning rate, which goes on, and progress."""
    state = read_state(read_snapshot(folder))
    parts = ("exp_avg", "scoring", "module/", "fp32", "single_partition", "/state/")
    return {name: value for name, value in state.items() if any(part in name for part in parts)}


def check_one_skipped(config):
    """The third of four optimizer steps changed nothing, the others did."""
    states = [trained_state(folder) for folder in snapshot_folders(run_folder(config) / "checkpoints")]
    tensors = [{n: v for n, v in state.items() if isinstance(v, torch.Tensor)} for state in states]
    assert len(tensors) == 4 and len(tensors[0]) > 20
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[2].items())
    for before, after in ((0, 1), (2, 3)):
        assert any(not torch.equal(value, tensors[before][name]) for name, value in tensors[after].items())
    assert all(value.isfinite().all() for value in tensors[3].values())
    assert logged(config, "optim/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1}


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


def trained_samples(lines):
    """Return {(optimizer step, global sample index): digest of tokens and noise} of all processes."""
    words = [line.split() for line in lines if " sample " in line and line.startswith("step")]
    return {(int(step), int(index)): digest for _, step, _, index, digest in words}


def check_resize(make_config, strategy, before, after, max_steps, kill_after):
    """Go on with another number of processes on the same samples and noise; return how far loss and norm go apart."""
    options = dict(strategy=strategy, max_steps=max_steps, global_batch_size=8, checkpoint_every=5)
    unbroken = make_config(name="unbroken", devices=before, **options)
    expected = trained_samples(Program(unbroken, poisoned("", [])).finish())
    broken = make_config(name="broken", devices=before, **options)
    program = Program(broken, poisoned("", []))
    assert program.wait_for(f"step {kill_after}/")
    program.kill(None, 0)
    lines = Program(dataclasses.replace(broken, devices=after), poisoned("", [])).finish()
    start = kill_after // 5 * 5
    assert f"resumed at step {start}" in lines
    found = trained_samples(lines)
    assert len(expected) == 8 * max_steps
    assert found == {key: digest for key, digest in expected.items() if key[0] > start}
    pairs = [(logged(unbroken, tag), logged(broken, tag)) for tag in ("train/loss", "optim/grad_norm")]
    assert all(list(first) == list(second) == list(range(1, max_steps + 1)) for first, second in pairs)
    return max(abs(second[step] / first[step] - 1) for first, second in pairs for step in first)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2", "fsdp2"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_samples(make_config, strategy, before, after):
    assert check_resize(make_config, strategy, before, after, max_steps=12, kill_after=7) < 1e-3
