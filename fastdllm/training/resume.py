"""Going on in a run folder: its lock, its config, and the saving of its checkpoints."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer

from fastdllm.cli import flatten, to_dict
from fastdllm.runtime import lock_file
from fastdllm.training.clock import Clock
from fastdllm.training.module import AdaptModule
from fastdllm.training.requeue import StopOnSignal
from fastdllm.training.snapshots import Snapshot, complete, describe_files, read_snapshot, remove_old, snapshot_folders
from fastdllm.training.strategies import reshard_zero

LOCK_FILE = "lock"
CONFIG_FILE = "config.yaml"
MAY_CHANGE = (  # between two starts of one run: they change neither the weights nor what was logged
    "task",
    "compile",
    "recompute",
    "micro_batch_size",
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
    "sample_trace",
    "data.num_workers",
    "data.prepare_per_node",
    "data.loader_workers",
    "data.cache_dir",
)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process, however it ends.

    Raises:
        RuntimeError: another process holds it.
    """
    with lock_file(run / LOCK_FILE) as holder:
        if holder:
            raise RuntimeError(f"{run} is in use by {holder}; wait for it, or give this run another --name.")
        yield


def remove_run(run: Path) -> None:
    """Delete everything in the run folder but its lock."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


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
        hint = " An absent key means that another revision started it." if "'absent'" in str(changed) else ""
        raise ValueError(
            f"{run} was started with another config: {'; '.join(changed)}.{hint} Change it back, give the run another "
            "--name, or --fresh to delete the old run and start anew."
        )


def make_ready(trainer: Trainer, module: AdaptModule, snapshot: Snapshot) -> None:
    """Make ready to go on from the snapshot, also one that another number of processes wrote.

    Raises:
        ValueError: it holds another model, or updates of another one.
    """
    if snapshot.num_parameters != module.num_parameters:
        raise ValueError(
            f"{snapshot.folder} holds {snapshot.num_parameters:,} parameters, and the checkpoint that this run starts "
            f"from has {module.num_parameters:,}: another shape. Put the old one back, or --fresh to start anew."
        )
    if snapshot.frozen_checksum != module.frozen_checksum:
        raise ValueError(
            f"{snapshot.folder} holds updates of frozen weights with checksum {snapshot.frozen_checksum:08x}, and the "
            f"checkpoint that this run starts from has {module.frozen_checksum:08x}: other weights of the same shape. "
            "Put the old one back, or --fresh to start anew."
        )
    module.earlier_data_tokens = snapshot.data_tokens
    if snapshot.strategy.startswith("deepspeed") and snapshot.world_size != trainer.world_size:
        reshard_zero(trainer.strategy, snapshot.state)


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

    def on_load_checkpoint(self, trainer: Trainer, module: AdaptModule, checkpoint: dict[str, Any]) -> None:
        """Count the micro-batches done as this start divides a step; Lightning restores those of the writer."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = checkpoint["global_step"] * trainer.accumulate_grad_batches - counts["processed"]
            counts.update({name: count + shift for name, count in counts.items()})

    def _save(self, trainer: Trainer, module: AdaptModule, step: int, is_last: bool) -> None:
        trainer.logger.experiment.flush()  # a kill would take the log's last lines, which are not written again
        data_tokens = module.data_tokens()
        # the folder is this start's own: a killed start may have left processes that still write
        is_first = trainer.is_global_zero
        facts = (os.getpid(), self._needed_bytes(module), self._free_bytes()) if is_first else None
        process, needed, free = trainer.strategy.broadcast(facts)
        final = self.checkpoints / f"step-{step:06d}.ckpt"
        partial = final.with_suffix(f".{process}.partial")
        if needed > free:
            raise RuntimeError(self._failure(partial, "the disk is full", needed))
        try:
            files = self._write(trainer, partial)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise RuntimeError(self._failure(partial, str(error), needed)) from error
            error.add_note(f"While saving {partial}. Earlier checkpoints there are whole: start the run again.")
            raise
        if is_first:
            snapshot = Snapshot(
                folder=final,
                step=step,
                data_tokens=data_tokens,
                strategy=self.strategy,
                world_size=trainer.world_size,
                num_parameters=module.num_parameters,
                frozen_checksum=module.frozen_checksum,
                is_last=is_last,
                max_minutes=self.max_minutes,
                files=files,
            )
            complete(partial, snapshot)
            remove_old(self.checkpoints, self.keep)

    def _write(self, trainer: Trainer, partial: Path) -> dict[str, list[int]]:
        """Write the state below `partial`, all processes together; return the files for the list in `meta.json`."""
        if trainer.is_global_zero:
            partial.mkdir(parents=True)
        trainer.strategy.barrier("checkpoint folder")
        trainer.save_checkpoint(partial / "state")  # returns when all processes have written
        return describe_files(partial, trainer.global_rank, trainer.world_size)

    def _needed_bytes(self, module: AdaptModule) -> int:
        """Return the size of the last checkpoint; before the first, float32 weights and AdamW's means."""
        folders = snapshot_folders(self.checkpoints)
        return read_snapshot(folders[-1]).num_bytes if folders else 12 * module.num_trained

    def _free_bytes(self) -> int:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.checkpoints).free

    def _failure(self, partial: Path, cause: str, needed: int) -> str:
        return (
            f"Saving {partial} failed ({cause}): a checkpoint takes about {needed:,} bytes, and {self._free_bytes():,} "
            f"are free in {self.checkpoints}. Earlier checkpoints there are whole: make room and start the run again."
        )
