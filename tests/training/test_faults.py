"""Non-finite steps are skipped, counted and end training when they do not stop; bad input is named."""

import dataclasses
import math
import re
import shutil

import numpy as np
import pytest
import torch

import fastdllm.training.run as training
from benchmarks.kill_training import KillConfig, check_strategy, differences, logged, read_state
from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import to_yaml
from fastdllm.data.packing import PackedSamples
from fastdllm.training.config import run_folder
from fastdllm.training.export import read_weights
from fastdllm.training.run import train
from fastdllm.training.snapshots import newest_complete, read_snapshot, snapshot_folders
from training import probe
from training.conftest import by_hand, flip_a_bit
from training.forked_training import ForkedTraining

REFUSALS = (ValueError, FileNotFoundError, RuntimeError)


def plan(kind="", steps=(), rank=0):
    return {"kind": kind, "steps": list(steps), "rank": rank}


def start(config, **poison):
    return ForkedTraining(config, plan(**poison))


def check_only_the_third_step_changed_nothing(config):
    """Compare weights, AdamW's means and its count of steps in the checkpoints of steps 1 to 4."""
    states = []
    for folder in snapshot_folders(run_folder(config) / "checkpoints")[:4]:
        values = read_state(read_snapshot(folder))
        states.append({name: value for name, value in values.items() if isinstance(value, torch.Tensor)})
    assert len(states) == 4 and sum("exp_avg" in name for name in states[0]) >= 4
    assert differences(states[1], states[2]) == []
    assert differences(states[0], states[1]) and differences(states[2], states[3])
    assert all(value.isfinite().all() for value in states[3].values() if value.is_floating_point())


def spoil_third_step(monkeypatch, kind):
    callbacks = training.make_callbacks
    monkeypatch.setattr(training, "make_callbacks", lambda *parts: [probe.Probe(plan(kind, [3])), *callbacks(*parts)])
    monkeypatch.setattr(training, "AdaptModule", probe.SpoiltModule)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_non_finite_step_changes_nothing_and_is_counted(make_config, monkeypatch, kind):
    spoil_third_step(monkeypatch, kind)
    config = make_config(max_steps=4, checkpoint_every=1, keep_checkpoints=4)
    train(config)
    check_only_the_third_step_changed_nothing(config)
    assert logged(config, "optim/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1}


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_the_logged_means_leave_out_skipped_steps(make_config, monkeypatch, kind):
    spoil_third_step(monkeypatch, kind)
    each, paired = (make_config(name=f"every{every}", max_steps=4, log_every=every) for every in (1, 2))
    train(each)
    train(paired)
    for tag in ("train/loss", "train/masked_accuracy"):
        values, means = logged(each, tag), logged(paired, tag)
        assert list(values) == list(means) == [1, 2, 4]
        assert means[4] == values[4] and math.isfinite(values[4])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *(by_hand(name) for name in ("ddp", "deepspeed_stage_2"))])
def test_non_finite_steps_of_one_process_are_skipped_by_all_and_twenty_end_training(make_config, strategy):
    config = make_config(max_steps=60, checkpoint_every=1, keep_checkpoints=60, devices=2, strategy=strategy)
    program = start(config, kind="inf", steps=[3, *range(6, 60)], rank=1)
    with pytest.raises(RuntimeError, match=r"20 optimizer steps in a row .* up to step 25, .* indices 96 to 99"):
        program.finish()
    check_only_the_third_step_changed_nothing(config)


def trained_samples(lines):
    """Return {(optimizer step, global sample index): digest of tokens and noise} of all processes."""
    found = re.findall(r"step (\d+) sample (\d+) ([0-9a-f]{16})", "\n".join(lines))  # two processes may share a line
    return {(int(step), int(index)): digest for step, index, digest in found}


def change_world_size(make_config, strategy, before, after, max_steps):
    """Go on with another number of processes, on the same samples and noise, from step 5, as step 10 is damaged.

    Returns: how far loss and gradient norm come to lie from those of the unbroken run.
    """
    options = dict(strategy=strategy, max_steps=max_steps, global_batch_size=8, checkpoint_every=5, keep_checkpoints=99)
    unbroken, changed = (
        make_config(name="a", devices=before, **options),
        make_config(name="b", devices=after, **options),
    )
    expected = trained_samples(start(unbroken).finish())
    for name in ("step-000005.ckpt", "step-000010.ckpt"):
        folder = run_folder(changed) / "checkpoints" / name
        shutil.copytree(run_folder(unbroken) / "checkpoints" / name, folder)
    flip_a_bit(max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    (run_folder(changed) / "config.yaml").write_text(to_yaml(changed))
    lines = start(changed).finish()
    assert "resumed at step 5" in lines and any("step-000010.ckpt is damaged" in line for line in lines)
    assert len(expected) == 8 * max_steps
    assert trained_samples(lines) == {key: digest for key, digest in expected.items() if key[0] > 5}
    distances = []
    for tag in ("train/loss", "optim/grad_norm"):
        first, second = logged(unbroken, tag), logged(changed, tag)
        assert list(second) == list(range(6, max_steps + 1))
        distances += [abs(second[step] / first[step] - 1) for step in second]
    return max(distances)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "before", "after"), [("deepspeed_stage_2", 2, 1), by_hand("auto", 1, 2), by_hand("fsdp2", 2, 1)]
)
def test_another_number_of_processes_goes_on_with_the_same_samples(make_config, strategy, before, after):
    assert change_world_size(make_config, strategy, before, after, max_steps=10) < 1e-3


@pytest.mark.slow
def test_killed_processes_resume_bit_for_bit(tmp_path):
    config = KillConfig(kills=1, max_steps=5, output_dir=str(tmp_path), seed=1)
    tally = check_strategy(config, "ddp")
    assert tally.differences == 0 and tally.places["save"] == 1


BAD_DATA = [
    ("", "", "holds no rows"),
    ('{"messages": [{"role": "user", "content": "Hello?"}]}\n', "messages", "no assistant turn"),
    ('{"prompt": "1+1=?", "response": "' + "2 " * 99 + '"}\n', "", "longer than data.sample_length .64."),
]


@pytest.mark.parametrize(("text", "column", "message"), BAD_DATA, ids=["empty", "no assistant turn", "too long"])
def test_bad_data_is_refused_by_its_name(make_config, tmp_path, text, column, message):
    config = make_config()
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    data = dataclasses.replace(config.data, path=str(file), long_documents="error", cache_dir=str(tmp_path / "cache"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(dataclasses.replace(config, data=data))


@pytest.mark.parametrize(("every", "are_all_zero"), [(1, True), (2, False)])
def test_micro_batches_without_any_target_add_nothing(make_config, monkeypatch, every, are_all_zero):
    get_sample = PackedSamples.__getitem__

    def without_targets(samples, number):
        sample = get_sample(samples, number)
        return sample | ({"is_response": np.zeros_like(sample["is_response"])} if number % every == 0 else {})

    monkeypatch.setattr(PackedSamples, "__getitem__", without_targets)
    config = make_config(micro_batch_size=1, sample_every=0, max_steps=4)
    train(config)
    losses = logged(config, "train/loss")
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses.values())
    assert all(loss == 0.0 for loss in losses.values()) == are_all_zero
    assert set(logged(config, "optim/skipped_steps").values()) == {0}
    start = load_checkpoint(config.checkpoint).qwen.state_dict()
    end = read_weights(newest_complete(run_folder(config) / "checkpoints"))
    assert all(torch.equal(start[name], weight) for name, weight in end.items()) == are_all_zero
