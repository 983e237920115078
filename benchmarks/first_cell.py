"""What does the first cell of a study pay for, that the later ones do not? One JSON row.

    python benchmarks/first_cell.py --checkpoint FOLDER --prompts FILE.jsonl --output rows/first_cell.json

The cells k1_first, k1_middle and k1_last are one computation: with reuse_k 1 no layer is reused. In a fresh process
each is timed once from the moment its engine is made, in this order and with no warm-up, as a script that goes through
a grid would; then all three `repeats` times more, interleaved. A process of its own for each form of the engine:
eager layers, and the engine as it comes on this device.
"""

import json
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from prompts import read_requests  # beside this file

from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import run
from fastdllm.decoding.engine import Engine
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Request
from fastdllm.evaluation.results import markdown
from fastdllm.runtime import code_revision, device_name, get_optimal_dtype, pick_device, write_text

SUBSETS = ("first", "middle", "last")
FORMS = {"eager layers": {"is_graphed": False, "is_fused": False}, "the engine as it comes": {}}


@dataclass(frozen=True, kw_only=True)
class FirstCellConfig:
    """Time one computation under three names, cold and warm."""

    checkpoint: str
    """An adapted checkpoint."""
    prompts: str
    """JSON lines, gzip or not."""
    output: str
    """JSON file to write."""
    count: int = 10
    """Prompts taken, from the first."""
    max_new_tokens: int = 128
    """Limit on each answer."""
    batch_size: int = 1
    """Prompts decoded together."""
    repeats: int = 3
    """Times that each cell is timed after the first."""

    def __post_init__(self):
        for name in ("count", "max_new_tokens", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")


def measure(config: FirstCellConfig) -> None:
    """Print tokens/s of every pass as a table, and write them."""
    forms = {}
    for form in FORMS:
        with get_context("spawn").Pool(1) as process:  # nothing is warm there
            forms[form] = process.apply(_time_cells, (form, config))
    commit, is_dirty = code_revision()
    facts = {"device": device_name(pick_device()), "revision": commit, "is_dirty": is_dirty, "config": asdict(config)}
    write_text(Path(config.output), json.dumps({"tokens_per_second": forms} | facts, indent=1) + "\n")
    print(markdown(table(forms)))


def table(forms: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Return the lines of the table: tokens/s of every cell, without a warm-up and then repeat by repeat."""
    repeats = len(next(iter(next(iter(forms.values())).values()))) - 1
    lines = [["engine", "cell", "first time", *(f"repeat {number + 1}" for number in range(repeats))]]
    for form, cells in forms.items():
        lines += [[form, cell, *(f"{speed:,.1f}" for speed in speeds)] for cell, speeds in cells.items()]
    return lines


def _time_cells(form: str, config: FirstCellConfig) -> dict[str, list[float]]:
    """Return tokens/s of each cell, the first time first."""
    device = pick_device()
    checkpoint = load_checkpoint(config.checkpoint, dtype=get_optimal_dtype(device)[0], device=str(device))
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer
    requests = read_requests(config.prompts, config.count, config.max_new_tokens, tokenizer)
    speeds: dict[str, list[float]] = {f"k1_{subset}": [] for subset in SUBSETS}
    engines: dict[str, Engine] = {}
    for _ in range(1 + config.repeats):
        for subset in SUBSETS:
            started = time.perf_counter()
            if subset not in engines:
                reuse = ReuseConfig(reuse_k=1, subset=subset)
                engines[subset] = Engine(model, tokenizer, reuse=reuse, batch_size=config.batch_size, **FORMS[form])
            speeds[f"k1_{subset}"].append(_tokens(engines[subset], requests) / (time.perf_counter() - started))
    return speeds


def _tokens(engine: Engine, requests: list[Request]) -> int:
    count = sum(len(completion.tokens) for completion in engine.run(requests))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    run(FirstCellConfig, measure)
