"""Traces of a cell's first problems: each decoded again, alone, and kept beside the cell's row."""

from pathlib import Path
from typing import Any

from fastdllm.checkpoint import Checkpoint
from fastdllm.decoding.record import record
from fastdllm.decoding.trace import Trace, read_trace, write_trace
from fastdllm.evaluation import harness
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.settings import check_likelihood, harness_arguments
from fastdllm.evaluation.sweep import Cell
from fastdllm.evaluation.tasks import load_task
from fastdllm.runtime import device_name


def keep_traces(
    cell: Cell, checkpoint: Checkpoint, config: EvaluateConfig, folder: Path, revision: str, *, is_forced: bool
) -> list[Path]:
    """Write `<folder>/traces/<cell>.<number>.json` for the first `config.trace` problems; return the files.

    Those of the same cell and checkpoint are left as they are unless `is_forced`. The problems are answered and scored
    once more on the way. Of a repeated cell the first repeat alone is traced.

    Raises:
        ValueError: the task is scored by log-likelihood, and nothing is decoded.
    """
    if cell.settings["repeat"] > 1:
        return []
    identity = {"checkpoint_hash": checkpoint.digest, "config_digest": cell.digest, "revision": revision}
    files = [folder / "traces" / f"{cell.name}.{number}.json" for number in range(config.trace)]
    if not is_forced and all(_is_of(file, identity) for file in files):
        return files
    task = load_task(cell.settings["task"], config.offline)
    if task.is_likelihood:
        check_likelihood(config)
    model = harness.FastDLLMv2(checkpoint=checkpoint, **harness_arguments(cell.settings))
    problems = harness.run_task(model, task, limit=config.trace).problems[: config.trace]
    for file, problem in zip(files, problems, strict=False):
        write_trace(file, _trace(model, cell, problem, identity))
    print(f"wrote {len(problems)} traces: {folder}/traces/{cell.name}.*.json", flush=True)
    return files[: len(problems)]


def _is_of(file: Path, identity: dict[str, str]) -> bool:
    """Return whether the file is a trace of this cell and checkpoint, whatever the code's revision."""
    names = ("checkpoint_hash", "config_digest")
    return file.exists() and all(read_trace(file).identity.get(name) == identity[name] for name in names)


def _trace(model: harness.FastDLLMv2, cell: Cell, problem: dict[str, Any], identity: dict[str, str]) -> Trace:
    key = problem["task"], problem["doc_id"]
    request = model.requests[key]
    decoding = {"mode": model.mode, "decode": model.decoding, "reuse": model.reuse}
    done, steps, timing = record(model.model, model.tokenizer, request, **decoding)
    is_token_wise = model.mode == "ar" or model.decoding.is_verified
    return Trace(
        cell=cell.name,
        label=cell.settings["label"],
        task=problem["task"],
        problem=problem["doc_id"],
        target=str(problem["target"]),
        # the score is that of the answer in a batch, which a tie may have led elsewhere
        correct=problem["correct"] if done.text == model.completions[key].text else None,
        mode=model.mode,
        settings={name: value for name, value in cell.settings.items() if value is not None},
        identity=identity,
        device=device_name(model.device),
        dtype=str(model.model.dtype).removeprefix("torch."),
        timing=timing,
        num_layers=model.model.num_layers,
        block_size=1 if is_token_wise else model.model.block_size,
        num_prompt_tokens=len(request.prompt),
        prompt=problem["prompt"],
        text=done.text,
        num_tokens=done.counted_tokens,
        steps=steps,
    )
