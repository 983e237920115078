"""How often is a proposal right, by its confidence, and where in a block do tokens come in parallel? One JSON row.

    python benchmarks/calibrate.py --checkpoint data/tiny-adapted --limit 50 --output rows/calibration.json

Every problem is decoded twice by the plain decoder, one token per step and at `threshold`: one sequence at a time, slow
on purpose, and equal to the engine. What is counted, and what right means: fastdllm/evaluation/calibration.py. Stop
strings of a task do not stop it here; they cut the text that is scored.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calibration import (  # beside this file
    EDGES,
    Traced,
    calibration_caption,
    calibration_lines,
    confidence_counts,
    position_counts,
)

from fastdllm.checkpoint import Adaptation, load_checkpoint
from fastdllm.cli import run, to_dict
from fastdllm.decoding.config import check_decoding
from fastdllm.decoding.engine import stop_token_ids
from fastdllm.decoding.pieces import cut_text
from fastdllm.decoding.reference import decode_plain, decode_with_stale_keys
from fastdllm.decoding.rows import Completion, Request
from fastdllm.evaluation import harness
from fastdllm.evaluation.arguments import pick_dtype, resolve_mode
from fastdllm.evaluation.results import Row
from fastdllm.evaluation.settings import default_label
from fastdllm.evaluation.tasks import load_task
from fastdllm.runtime import code_revision, device_name, library_versions, pick_device, write_text


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What is decoded, and where the row goes."""

    checkpoint: str
    """Adapted checkpoint: hub id, export or published checkpoint."""
    output: str
    """JSON file to write."""
    task: str = ""
    """lm-eval task that generates; empty: the task that the export remembers."""
    offline: str = ""
    """Folder with evaluation data laid out by hub id; empty: the hub."""
    limit: int = 50
    """First problems of each task; 0: all."""
    threshold: float = 0.9
    """Confidence in (0, 1) of the second decoding."""
    sub_block_size: int = 0
    """Tokens; divides the block size; 0: what the export remembers, else 8."""
    use_block_cache: bool = True
    """Use the sub-block cache, as the engine does by default."""
    max_new_tokens: int = 0
    """Most new tokens of an answer; 0: the task's own limit, or 2048 where it has none."""
    label: str = ""
    """Name of the model in the row; empty: taken from the checkpoint's name."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: bfloat16, float16 or float32, by the device."""

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold must be in (0, 1), got {self.threshold}: 1.0 is measured anyway, try 0.9 beside it."
            )
        for name in ("limit", "sub_block_size", "max_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")


class TracingEngine:
    """Answers one request after the other with a plain decoder, and owns what it noted, by index of the request."""

    decode_seconds = None

    def __init__(self, lm: "TracedLM"):
        self.lm, self.seconds = lm, 0.0

    def free(self) -> None:
        """Nothing is kept between runs but traces."""

    def run(self, requests: Sequence[Request], skip: Collection[int] = ()) -> Iterator[Completion]:
        """Answer every request but those whose indices are in `skip`; counts of layers are left at 0."""
        lm, decode = self.lm, self.lm.decoding
        stop_ids = stop_token_ids(lm.tokenizer)
        for index, request in enumerate(requests):
            if index in skip:
                continue
            plain = decode_with_stale_keys if decode.use_block_cache else decode_plain
            decoded = plain(
                lm.model,
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                stop_ids=stop_ids,
                threshold=decode.threshold,
                sub_block_size=decode.sub_block_size,
                is_traced=True,
            )
            lm.traces[index] = Traced(prompt_length=len(request.prompt), decoded=decoded)
            kept = [token for token in decoded.tokens if token not in stop_ids]  # a stop token is the last
            text = cut_text(lm.tokenizer.decode(kept, skip_special_tokens=False), request.stop_strings)
            yield Completion(
                index=index,
                tokens=decoded.tokens,
                text=text,
                counted_tokens=len(decoded.tokens),
                computed_tokens=sum(candidate.is_accepted for step in decoded.trace or [] for candidate in step),
                prefill_passes=0,
                denoise_passes=decoded.denoise_passes,
                append_passes=decoded.append_passes,
                full_passes=decoded.full_passes,
                layers_run=0,
            )


class TracedLM(harness.FastDLLMv2):
    """The lm-eval adapter with the plain decoder in place of the engine."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.traces: dict[int, Traced] = {}

    def _engine(self) -> TracingEngine:
        return TracingEngine(self)

    def _warm_up(self, queue: list[Request]) -> None:
        """Nothing is timed."""


def measure(config: CalibrationConfig) -> Row:
    """Decode every problem twice, write the row and return it.

    Raises:
        ValueError, FileNotFoundError: what cannot be decoded, with the way out.
    """
    device = pick_device(config.device)
    checkpoint = load_checkpoint(config.checkpoint, dtype=pick_dtype(config.dtype, device), device=device)
    resolve_mode("diffusion", checkpoint)
    adaptation = checkpoint.adaptation or Adaptation()
    arguments = {"small_block_size": config.sub_block_size or adaptation.sub_block_size, "mode": "diffusion"}
    arguments |= {"use_block_cache": config.use_block_cache, "device": config.device, "dtype": config.dtype}
    arguments |= {"max_new_tokens": config.max_new_tokens} if config.max_new_tokens else {}
    revision, is_dirty = code_revision()
    runs = {}
    for name, threshold in (("one_token", 1.0), ("parallel", config.threshold)):
        lm = TracedLM(checkpoint=checkpoint, threshold=threshold, **arguments)
        check_decoding(
            "diffusion",
            lm.decoding,
            lm.reuse,
            block_size=lm.model.block_size,
            num_layers=lm.model.num_layers,
            context_attention=lm.model.context_attention,
        )
        task = load_task(config.task or adaptation.task, config.offline)
        if task.is_likelihood:
            raise ValueError(f"task {task.name} generates nothing, so nothing is unmasked; choose one that generates.")
        result = harness.run_task(lm, task, limit=config.limit)
        runs[name] = lm, result, [lm.traces[index] for index in sorted(lm.traces)]
    lm, result, traces = runs["one_token"]
    row = {
        "kind": "calibration",
        "label": config.label or default_label(config.checkpoint),
        "model": checkpoint.portable_source,
        "checkpoint_hash": checkpoint.digest,
        "task": task.name,
        "metric": result.metric,
        "num_samples": len(result.problems),
        "threshold": config.threshold,
        **{name: _summary(*run[1:]) for name, run in runs.items()},
        "edges": list(EDGES),
        **confidence_counts(traces),
        **position_counts(runs["parallel"][2], lm.model.block_size),
        "device": device_name(device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "revision": revision,
        "is_dirty": is_dirty,
        "versions": library_versions(),
        "config": {**to_dict(config), "output": Path(config.output).name, **arguments, "task": task.name},
    }
    write_text(config.output, json.dumps(row, indent=1) + "\n")
    return row


def _summary(result: Any, traces: Sequence[Traced]) -> dict[str, float]:
    decoded = [traced.decoded for traced in traces]
    return {
        "accuracy": sum(problem["correct"] for problem in result.problems) / len(result.problems),
        "counted_tokens": sum(len(each.tokens) for each in decoded),
        "denoise_passes": sum(each.denoise_passes for each in decoded),
        "append_passes": sum(each.append_passes for each in decoded),
    }


def measure_and_say(config: CalibrationConfig) -> None:
    row = measure(config)
    for line in calibration_lines(row):
        print("  ".join(text.rjust(16) for text in line))
    print(f"{calibration_caption(row)}\nwrote {config.output}")


if __name__ == "__main__":
    run(CalibrationConfig, measure_and_say)
