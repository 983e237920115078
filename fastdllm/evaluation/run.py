"""`evaluate(config)`: one measurement or a grid of them, one row for each."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fastdllm.checkpoint import Checkpoint
from fastdllm.evaluation import harness, sweep
from fastdllm.evaluation.code_tasks import permit_code
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.events import CELLS, write_events
from fastdllm.evaluation.outcomes import pack_outcomes
from fastdllm.evaluation.results import (
    Counts,
    Row,
    make_row,
    print_table,
    ratios,
    read_row,
    read_rows,
    write_row,
    write_samples,
)
from fastdllm.evaluation.scoring import TaskRun, score
from fastdllm.evaluation.settings import (
    LIKELIHOOD_UNUSED,
    Plan,
    by_checkpoint,
    check_likelihood,
    harness_arguments,
    make_plans,
    run_folder,
    source_of,
)
from fastdllm.evaluation.store import SampleStore, digest
from fastdllm.evaluation.tasks import load_task
from fastdllm.evaluation.traces import keep_traces
from fastdllm.runtime import code_revision, device_name, library_versions, load_average, pick_device


def evaluate(config: EvaluateConfig) -> list[Row]:
    """Measure what has no valid row yet, print the tables of the run folders, and return the rows of this config.

    Raises:
        ValueError, FileNotFoundError: what cannot be evaluated, with the way out.
    """
    rows = run_missing(config)
    if rows and not (config.status or config.dry_run):
        print_table(rows, show_mixed_revisions=True)
        folders = [run_folder(one.run, source_of(one)) / "rows" for one in by_checkpoint(config)]
        for folder in dict.fromkeys(folders):
            if any(row not in rows for row in read_rows(folder)):
                show_rows(folder, config.show_mixed_revisions)
    return rows


def run_missing(config: EvaluateConfig) -> list[Row]:
    """Measure what has no valid row yet and return its rows, or only say what is there (status, dry_run)."""
    plans = make_plans(config)  # what cannot be is refused before anything runs
    tasks = list(dict.fromkeys(cell.settings["task"] for plan in plans for cell in plan.cells))
    if not (config.checkpoint or config.axes.checkpoint):
        print(f"checkpoint: {plans[0].checkpoint.source} (the newest export under runs/), task {', '.join(tasks)}")
    forced = sweep.forced_cells([cell for plan in plans for cell in plan.cells], config.force)
    revision = code_revision()  # what runs from here on, whatever is committed meanwhile
    rows: list[Row] = []
    with _permission(tasks, config):
        for plan in plans if config.status else in_rounds(plans):
            rows += _run_plan(plan, config, forced, revision)
            plan.checkpoint.release()  # the weights of one checkpoint are in memory at a time
    return rows


def in_rounds(plans: list[Plan]) -> list[Plan]:
    """Return the plans cut up so that each repeat goes once through all checkpoints: drift meets all cells alike."""
    if len(plans) == 1:
        return plans  # its cells are in that order already
    numbers = sorted({cell.settings["repeat"] for plan in plans for cell in plan.cells})
    return [
        dataclasses.replace(plan, cells=[cell for cell in plan.cells if cell.settings["repeat"] == number])
        for number in numbers
        for plan in plans
    ]


def _permission(tasks: list[str], config: EvaluateConfig) -> AbstractContextManager:
    """Return a context in which the programs of these tasks may run, if any do. Raises ValueError: not allowed."""
    if config.status or config.dry_run:
        return nullcontext()
    return permit_code(tasks, allow_code_execution=config.allow_code_execution, allow_network=config.allow_network)


def _run_plan(plan: Plan, config: EvaluateConfig, forced: set[str], revision: tuple[str, bool]) -> list[Row]:
    checkpoint, cells, rows = plan.checkpoint, plan.cells, plan.folder / "rows"
    if config.status:
        print("\n".join(sweep.status_lines(cells, rows, checkpoint.digest)))
        return read_cells(cells, rows)
    to_run = sweep.cells_to_run(cells, rows, checkpoint.digest, forced)
    if config.dry_run:
        print("\n".join(f"would run {cell.name} ({reason})" for cell, reason in to_run) or "nothing to run")
        return read_cells(cells, rows)
    device, dtype = device_name(pick_device(config.device)), cells[0].settings["dtype"]
    print(f"{len(to_run)} of {len(cells)} measurements to run on {device} in {dtype}")

    def measure_cell(cell: sweep.Cell) -> Row:
        return measure(cell, checkpoint, config, plan.folder, revision)

    elsewhere = sweep.run_cells(to_run, rows, checkpoint.digest, measure_cell)
    ours = [cell for cell in cells if cell not in elsewhere]
    if config.trace:
        again = {cell.name for cell, _ in to_run}
        for cell in ours:
            keep_traces(cell, checkpoint, config, plan.folder, revision[0], is_forced=cell.name in again)
    return read_cells(ours, rows)


def show_rows(folder: Path, show_mixed_revisions: bool = False) -> None:
    """Print the table of all rows in `folder`, or why they do not belong into one table."""
    rows = read_rows(folder)
    try:
        print_table(rows, show_mixed_revisions)
    except ValueError as error:
        print(f"no table of {folder}: {error}")


def read_cells(cells: list[sweep.Cell], folder: Path) -> list[Row]:
    """Return the rows that are there for these cells."""
    rows = [read_row(folder / f"{cell.name}.json") for cell in cells]
    return [row for row in rows if row is not None]


def measure(
    cell: sweep.Cell, checkpoint: Checkpoint, config: EvaluateConfig, folder: Path, revision: tuple[str, bool]
) -> Row:
    """Run one cell, write its row and return it; the answers go into `<folder>/samples/<cell>.samples.jsonl`.

    What TensorBoard shows of it goes into `<folder>/cells/<cell>/`.
    Finished samples are kept in `<cell>.partial.jsonl` until the row is there: a cell that was killed goes on with the
    missing ones.
    """
    settings, load = cell.settings, load_average()
    task = load_task(settings["task"], config.offline)
    if task.is_likelihood:
        check_likelihood(config)
        settings = settings | dict.fromkeys(LIKELIHOOD_UNUSED)
    model = harness.FastDLLMv2(checkpoint=checkpoint, **harness_arguments(settings))
    facts = {
        "checkpoint_hash": checkpoint.digest,
        "config_digest": cell.digest,
        "revision": revision[0],
        "is_dirty": revision[1],
        "device": device_name(model.device),
        "versions": library_versions(),
    }
    row_file = folder / "rows" / f"{cell.name}.json"
    replaced = digest(row_file.read_text()) if row_file.exists() else None  # a row forced again begins anew
    store = SampleStore(folder / "samples" / f"{cell.name}.partial.jsonl", {**facts, "replaced_row": replaced})
    model.keep(store)
    result = harness.run_task(model, task, limit=cell.settings["limit"])
    write_samples(folder / "samples" / f"{cell.name}.samples.jsonl", result.problems, model.completions)
    row = _make_row(cell, checkpoint, model, result, facts | {"load_average": load, "clock_mhz": model.clock_mhz})
    write_events(folder / CELLS / cell.name, row)
    write_row(folder / "rows", row)  # before the samples go, so that a kill in between costs nothing
    store.remove()
    return row


def _make_row(
    cell: sweep.Cell, checkpoint: Checkpoint, model: harness.FastDLLMv2, result: TaskRun, facts: dict[str, Any]
) -> Row:
    counts = count(model)
    does_not_apply = () if model.completions else sweep.GENERATION_ONLY  # log-likelihoods generate nothing
    return make_row(
        **{name: None if name in does_not_apply else cell.settings[name] for name in sweep.ROW_SETTINGS},
        **score([problem["correct"] for problem in result.problems], [problem["split"] for problem in result.problems]),
        **dataclasses.asdict(counts),
        **ratios(counts),
        **facts,
        cell=cell.name,
        model=checkpoint.portable_source,
        data_tokens=(checkpoint.adaptation.data_tokens or None) if checkpoint.adaptation else None,  # 0: not recorded
        metric=result.metric,
        metrics=result.metrics,
        likelihood=model.likelihood,
        dtype=str(model.model.dtype).removeprefix("torch."),
        outcomes=pack_outcomes(result.problems, model.completions, mode=model.mode),
        config=cell.settings,
    )


def count(model: harness.FastDLLMv2) -> Counts:
    """Return what the model's answers took; None for passes that its mode or the task does not have."""
    completions = list(model.completions.values())
    names = {field.name for field in dataclasses.fields(Counts)} - {"seconds", "decode_seconds"}
    if model.mode == "ar":
        names -= {"append_passes", "full_passes"}
    totals = {name: sum(getattr(done, name) for done in completions) for name in names} if completions else {}
    return Counts(**totals, seconds=model.seconds, decode_seconds=model.decode_seconds or None)
