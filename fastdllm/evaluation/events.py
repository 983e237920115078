"""Rows as TensorBoard shows them: each cell a run with its settings as hyper-parameters, and what it gave."""

from pathlib import Path

from fastdllm.evaluation.results import Row

CELLS = "cells"  # folder beside rows/, with one folder of events for each cell
METRICS = ("accuracy", "tokens_per_forward", "tokens_per_second")


def write_events(folder: str | Path, row: Row) -> None:
    """Write a row's settings and metrics as TensorBoard events into `folder`, in place of what a former run left there.

    Metrics are the scalars `evaluation/accuracy` and so on, those that the row has; settings that do not apply are
    left out.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    for old in Path(folder).glob("events.out.tfevents*"):
        old.unlink()
    settings = {name: value for name, value in row["config"].items() if value is not None}
    facts = {"model": row["model"], "data_tokens": row["data_tokens"] or 0, "device": row["device"]}
    metrics = {f"evaluation/{name}": row[name] for name in METRICS if row[name] is not None}
    with SummaryWriter(str(folder)) as writer:
        writer.add_hparams({**facts, **settings}, metrics, run_name=".")
