"""Run folders: locked, of one config, with complete checkpoints only."""

import dataclasses

import pytest

from fastdllm.cli import to_yaml
from fastdllm.training.resume import check_run, locked
from fastdllm.training.run import run_folder, train
from fastdllm.training.snapshots import newest_complete

META = '{{"step": {step}, "data_tokens": 1, "strategy": "auto", "world_size": 1, "is_last": false, "files": {{}}}}'

REFUSALS = (ValueError, FileNotFoundError, RuntimeError)


def make_checkpoint(checkpoints, step):
    folder = checkpoints / f"step-{step:06d}.ckpt"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(META.format(step=step))


def test_newest_complete_counts_steps_and_skips_unfinished_saves(tmp_path):
    assert newest_complete(tmp_path) is None
    for step in (10, 9, 1_000_000):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step-2000000.partial").mkdir()
    assert newest_complete(tmp_path).step == 1_000_000


def test_changed_config_is_refused_with_key_and_both_values(make_config):
    config = make_config(max_steps=2)
    train(config)
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3))
    with pytest.raises(REFUSALS, match=r"optimizer.learning_rate was 0.003 and is now 0.001"):
        train(changed)
    with pytest.raises(REFUSALS, match=r"strategy was 'auto' and is now 'ddp'"):
        train(dataclasses.replace(config, strategy="ddp"))


def test_fields_that_change_no_result_may_change(make_config):
    config = make_config(max_steps=2)
    train(config)
    workers = dataclasses.replace(config.data, loader_workers=1)
    changed = dataclasses.replace(config, devices=2, log_every=7, keep_checkpoints=9, checkpoint_every=1, data=workers)
    check_run(run_folder(config), changed)


def test_fresh_deletes_the_old_run(make_config):
    config = make_config(max_steps=2)
    train(config)
    old = run_folder(config) / "rows"
    old.mkdir()
    train(dataclasses.replace(config, fresh=True, max_steps=1))
    assert not old.exists()
    assert newest_complete(run_folder(config) / "checkpoints").step == 1


def test_second_run_in_the_same_folder_is_refused(make_config):
    config = make_config()
    with locked(run_folder(config)), pytest.raises(REFUSALS, match="is in use by process"):
        train(config)


def test_newest_checkpoints_are_kept_and_leftovers_go(make_config):
    config = make_config(max_steps=5, checkpoint_every=1, keep_checkpoints=2)
    checkpoints = run_folder(config) / "checkpoints"
    for name in ("step-000009.partial", "step-000001.old"):
        (checkpoints / name).mkdir(parents=True)
    (run_folder(config) / "config.yaml").write_text(to_yaml(config))
    train(config)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000004.ckpt", "step-000005.ckpt"]
