"""Signals: training ends at a step that all processes agree on, saved and not exported, and goes on from there."""

import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch

from fastdllm.training import run
from fastdllm.training.callbacks import Progress
from fastdllm.training.clock import Clock
from fastdllm.training.config import run_folder
from fastdllm.training.requeue import StopOnSignal, leave
from fastdllm.training.resume import SaveCheckpoints
from fastdllm.training.run import train
from fastdllm.training.snapshots import newest_complete
from training.conftest import exported_weights, run_program


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "owner, moment, number",
    [(run, "preflight", signal.SIGUSR1), (Progress, "on_train_start", signal.SIGTERM)],
    ids=["SIGUSR1 before training", "SIGTERM in training"],
)
def test_a_signal_stops_at_the_next_step_and_the_run_goes_on_bit_for_bit(
    make_config, monkeypatch, capsys, owner, moment, number
):
    unbroken, config = make_config(name="unbroken"), make_config(name="broken")
    train(unbroken)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(owner, moment, send(number))
        train(config)
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert f"{number.name} at step 1: saving and stopping" in capsys.readouterr().out
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    assert snapshot.step == 1 and not snapshot.is_last
    assert not (run_folder(config) / "export").exists()
    train(config)
    first, second = exported_weights(unbroken), exported_weights(config)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("validate_every", "is_due"), [(1, True), (2, False)])
def test_a_validation_runs_at_the_step_of_the_stop_where_it_is_due(
    make_config, monkeypatch, capsys, validate_every, is_due
):
    monkeypatch.setattr(run, "preflight", send(signal.SIGUSR1))
    with pytest.raises(SystemExit):
        train(make_config(validate_every=validate_every))
    assert ("validation at step 1" in capsys.readouterr().out) == is_due


def test_a_signal_at_the_last_step_ends_nothing_early(make_config, monkeypatch):
    config = make_config(max_steps=1)
    monkeypatch.setattr(run, "preflight", send(signal.SIGUSR1))
    assert (train(config) / "config.json").is_file()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(make_config):
    config = make_config(devices=2, max_steps=60, checkpoint_every=100)
    lines = run_program(config, kill_after=5, sent=signal.SIGUSR1)
    (stopped,) = re.findall(r"^SIGUSR1 at step (\d+)", "\n".join(lines), re.MULTILINE)
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    assert snapshot.step == int(stopped) < 60 and snapshot.world_size == 2
    assert f"resumed at step {stopped}" in run_program(config)


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Put a `scontrol` first in PATH that writes down its arguments and ends with the status in `status`."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\necho refused >&2\nexit $(cat {tmp_path}/status)\n')
    program.chmod(0o755)
    (tmp_path / "status").write_text("0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return tmp_path


def test_the_first_process_requeues_its_job_once(fake_slurm):
    leave(signal.SIGUSR1, is_first=False)
    leave(signal.SIGUSR1, is_first=True)
    assert (fake_slurm / "calls").read_text() == "requeue 12\n"


def test_sigterm_requeues_nothing(fake_slurm):
    with pytest.raises(SystemExit, match="143"):
        leave(signal.SIGTERM, is_first=True)
    assert not (fake_slurm / "calls").exists()


def test_a_refusal_of_slurm_is_an_error(fake_slurm):
    (fake_slurm / "status").write_text("1")
    with pytest.raises(RuntimeError, match="scontrol requeue 12: refused. All is saved"):
        leave(signal.SIGUSR1, is_first=True)


def test_processes_that_resumed_at_different_steps_are_stopped(tmp_path):
    save = SaveCheckpoints(
        tmp_path, every=1, keep=1, strategy="ddp", max_minutes=0.0, stop=StopOnSignal(), clock=Clock()
    )
    trainer = SimpleNamespace(global_step=3, global_rank=1, strategy=SimpleNamespace(broadcast=lambda step: 6))
    with pytest.raises(RuntimeError, match="process 1 resumed at step 3 and the first process at step 6"):
        save.on_train_start(trainer, None)
