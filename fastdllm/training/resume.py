"""Checkpoints of a run that are complete or absent, and the rules for going on in a run folder.

A checkpoint is a folder `checkpoints/step-000010.ckpt` with the strategy's own state (a file or a folder) and
`meta.json`. It is written under another name, synced and renamed, so what bears the name is whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer

from fastdllm.cli import flatten, to_dict
from fastdllm.runtime import write_text
from fastdllm.training.clock import Clock
from fastdllm.training.module import AdaptModule
from fastdllm.training.requeue import StopOnSignal

LOCK_FILE = "lock"
CONFIG_FILE = "config.yaml"
MAY_CHANGE = (  # between two starts of one run: they change neither the weights nor what was logged
    "devices",
    "num_nodes",
    "fresh",
    "max_minutes",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "num_samples",
    "sample_tokens",
    "data.num_workers",
    "data.loader_workers",
    "data.cache_dir",
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    data_tokens: int
    """Document tokens seen since step 0, over all processes."""
    strategy: str
    world_size: int
    is_last: bool
    """Whether training ended here: at max_steps or at its time limit, not at a signal."""
    max_minutes: float = 0.0
    """The time limit of the start that wrote it."""

    @property
    def state(self) -> Path:
        """What the strategy wrote: a file (auto, ddp) or a folder."""
        return self.folder / "state"


def newest_complete(checkpoints: Path) -> Snapshot | None:
    """Return the complete checkpoint with the most steps, or None."""
    folders = sorted(checkpoints.glob("step-*.ckpt"), key=_step_of)
    if not folders:
        return None
    return Snapshot(folder=folders[-1], **json.loads((folders[-1] / "meta.json").read_text()))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").removesuffix(".ckpt"))


def check_world_size(snapshot: Snapshot, strategy: str, world_size: int) -> None:
    """Raise a ValueError where DeepSpeed's checkpoint cannot be read by this number of processes."""
    if strategy.startswith("deepspeed") and snapshot.world_size != world_size:
        raise ValueError(
            f"{snapshot.folder} was written by {snapshot.world_size} processes, and DeepSpeed reads it with as many; "
            f"this start has {world_size}. Use {snapshot.world_size} devices in all, or --fresh to start anew."
        )


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process, however it ends.

    Raises:
        RuntimeError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RuntimeError(
                f"{run} is in use by process {file.read().strip() or 'unknown'}; wait for it, or give this run another "
                "--name."
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def remove_run(run: Path) -> None:
    """Delete everything in the run folder but its lock."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a killed save or a killed removal left behind."""
    for path in (*checkpoints.glob("step-*.partial"), *checkpoints.glob("step-*.old")):
        shutil.rmtree(path)


def check_run(run: Path, config: Any) -> None:
    """Raise a ValueError if the folder is no run, or has another config, naming each key with both values."""
    file = run / CONFIG_FILE
    others = [path.name for path in run.iterdir() if path.name != LOCK_FILE]
    if others and not file.exists():
        raise ValueError(f"{run} holds {others[0]} and no {CONFIG_FILE}, so it is no run folder; use another --name.")
    if not file.exists() or config.fresh:
        return
    before, now = flatten(yaml.safe_load(file.read_text())), flatten(yaml.safe_load(yaml.safe_dump(to_dict(config))))
    changed = [
        f"{key} was {before.get(key, 'absent')!r} and is now {now.get(key, 'absent')!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in MAY_CHANGE and before.get(key, "absent") != now.get(key, "absent")
    ]
    if changed:
        raise ValueError(
            f"{run} was started with another config: {'; '.join(changed)}. Change it back, give the run another "
            "--name, or --fresh to delete the old run and start anew."
        )


class SaveCheckpoints(Callback):
    """Saves every `every` optimizer steps and at the end; keeps the newest `keep` checkpoints."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        every: int,
        keep: int,
        strategy: str,
        max_minutes: float,
        stop: StopOnSignal,
        clock: Clock,
    ):
        self.checkpoints, self.every, self.keep, self.strategy, self.clock = checkpoints, every, keep, strategy, clock
        self.max_minutes, self.stop = max_minutes, stop
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, module: AdaptModule) -> None:
        """Raise a RuntimeError if this process resumed at another step than the first (a file system may lag)."""
        self.saved_step = trainer.global_step
        first = trainer.strategy.broadcast(self.saved_step)
        if first != self.saved_step:
            raise RuntimeError(
                f"process {trainer.global_rank} resumed at step {self.saved_step} and the first process at step "
                f"{first}: {self.checkpoints} does not look the same to both; start again."
            )

    def on_train_batch_end(self, trainer: Trainer, module: AdaptModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        is_end = step == trainer.max_steps or trainer.should_stop
        if step > self.saved_step and (is_end or step % self.every == 0):
            with self.clock.paused():
                self._save(trainer, module, step, is_last=is_end and not self.stop.agreed)
                trainer.strategy.barrier("checkpoint complete")  # so that no process leaves a save unfinished
            self.saved_step = step

    def _save(self, trainer: Trainer, module: AdaptModule, step: int, is_last: bool) -> None:
        final = self.checkpoints / f"step-{step:06d}.ckpt"
        partial = final.with_suffix(".partial")
        data_tokens = module.data_tokens()
        if trainer.is_global_zero:
            partial.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier("checkpoint folder")
        trainer.save_checkpoint(partial / "state")
        trainer.strategy.barrier("checkpoint written")
        if not trainer.is_global_zero:
            return
        snapshot = Snapshot(
            folder=final,
            step=step,
            data_tokens=data_tokens,
            strategy=self.strategy,
            world_size=trainer.world_size,
            is_last=is_last,
            max_minutes=self.max_minutes,
        )
        meta = {key: value for key, value in asdict(snapshot).items() if key != "folder"}
        write_text(partial / "meta.json", json.dumps(meta, indent=1) + "\n")
        _sync(partial)
        partial.rename(final)
        self._prune()

    def _prune(self) -> None:
        for folder in sorted(self.checkpoints.glob("step-*.ckpt"), key=_step_of)[: -self.keep]:
            old = folder.rename(folder.with_suffix(".old"))
            shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Force every file below `folder` to disk, so that the rename cannot get there before the contents."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
