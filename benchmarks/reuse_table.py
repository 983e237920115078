"""What does reuse cost in accuracy, what could it save, and what does it gain? One row for each way to reuse.

    python benchmarks/reuse_table.py [--batch_size 1] [--threshold 0.9] [--cells none,trim] [--limit 20]

Every cell answers the first `limit` problems of the bundled task once with hooks on all matrix products: that run
gives accuracy and work and warms up. Then all cells are timed in turn on the first `timed`, `repeats` times.
Everything is per counted token; gains are against the cell `none` of the same repeat, and the last column divides the
gain in CPU time by the bound by weights at batch size 1, by operations above.

- bound, operations: multiplications in matrix products, LM head and prefill included, of `none` over the cell's: what
  a machine could gain that computes at a constant rate.
- bound, weights: weights of all matrix products called, the same way: what a machine could gain that only reads them,
  as a GPU does at batch size 1.
Attention scores, norms and the host are in neither. Rows go into experiments/02_decode_speed/rows/reuse. At threshold
0.9 the bundled model needs one step for most sub-blocks, and a sub-block's first step is never reused.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import run
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Completion
from fastdllm.evaluation.results import markdown
from fastdllm.runtime import code_revision, device_name, write_text

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "experiments/02_decode_speed/rows/reuse"
SUBSETS = ("first", "middle", "last")
BUDGETS = (0.1, 0.3, 1.0)
COLUMNS = (
    *("reuse", "accuracy", "eligible steps", "layers saved", "rows saved", "bound, operations", "bound, weights"),
    *("gain, wall time", "gain, CPU time", "gain / bound"),
)


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What is measured."""

    checkpoint: str = "data/tiny-adapted"
    """Adapted checkpoint whose task is data/tiny."""
    batch_size: int = 32
    """Problems decoded together."""
    threshold: float = 1.0
    """Confidence above which a proposal is accepted; 1.0: one token a step, which gives reuse the most steps."""
    sub_block_size: int = 8
    """Tokens decoded at a time."""
    cells: str = ""
    """Names of the cells, joined by commas, such as none,trim,delta_k2_first; empty: all. `none` always runs."""
    limit: int = 0
    """First problems; 0: all 200."""
    timed: int = 32
    """First problems that are timed; 0: as many as are counted."""
    repeats: int = 3
    """Timed runs of each cell."""


def all_cells() -> dict[str, ReuseConfig]:
    """Return every way to reuse, by name."""
    cells = {"none": ReuseConfig(), "trim": ReuseConfig(active_rows="needed")}
    for mode in ("output", "delta", "attn"):
        for reuse_k in (2, 3):
            for subset in SUBSETS:
                name = f"{mode}_k{reuse_k}_{subset}"
                cells[name] = ReuseConfig(reuse_k=reuse_k, subset=subset, reuse_mode=mode)
    for budget in BUDGETS:
        for subset in SUBSETS:
            reuse = ReuseConfig(schedule="adaptive", budget=budget, subset=subset, reuse_mode="delta")
            cells[f"adaptive_{budget:g}_{subset}"] = reuse
    return cells


class Products:
    """Counts, while hooked, the multiplications and the weights of all matrix products of a model."""

    def __init__(self, model: nn.Module):
        self.operations, self.weights = 0, 0
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._handles = [module.register_forward_hook(self._count) for module in linear]

    def _count(self, module: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        self.weights += module.weight.numel()
        self.operations += inputs[0][..., 0].numel() * module.weight.numel()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Bench:
    """Owns the model and the problems."""

    def __init__(self, config: TableConfig):
        self.config, checkpoint = config, load_checkpoint(config.checkpoint, dtype=torch.float32, device="cpu")
        self.model, self.tokenizer = checkpoint.model(), checkpoint.tokenizer
        lines = (ROOT / "data/tiny/test.jsonl").read_text().splitlines()
        self.problems = [json.loads(line) for line in lines][: config.limit or None]
        chats = [[{"role": "user", "content": problem["prompt"]}] for problem in self.problems]
        texts = [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        self.requests = [Request(prompt=prompt, max_new_tokens=128) for prompt in ids]

    def answer(self, reuse: ReuseConfig, limit: int = 0) -> list[Completion]:
        decode = DecodeConfig(threshold=self.config.threshold, sub_block_size=self.config.sub_block_size)
        engine = Engine(self.model, self.tokenizer, decode=decode, reuse=reuse, batch_size=self.config.batch_size)
        return list(engine.run(self.requests[: limit or None]))

    def count(self, reuse: ReuseConfig) -> dict:
        """Return what the answers are worth and what they took."""
        products = Products(self.model)
        done = self.answer(reuse)
        products.remove()
        right = [d.text.endswith(f"#### {self.problems[d.index]['answer']}") for d in done]
        names = ("counted_tokens", "denoise_passes", "full_passes", "append_passes", "layers_run", "rows_run")
        totals = {name: sum(getattr(d, name) for d in done) for name in names}
        return totals | {
            "accuracy": sum(right) / len(right),
            "num_samples": len(right),
            "timed_tokens": sum(d.counted_tokens for d in done if d.index < (self.config.timed or len(done))),
            "operations": products.operations,
            "weights": products.weights,
        }

    def time(self, reuse: ReuseConfig) -> tuple[float, float]:
        """Return wall and CPU seconds of one run."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.answer(reuse, self.config.timed)
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(config: TableConfig) -> None:
    """Write one row for each cell and print them all as a table."""
    cells = all_cells()
    asked = config.cells.split(",") if config.cells else list(cells)
    unknown = sorted(set(asked) - set(cells))
    if unknown:
        raise ValueError(f"no cell {unknown[0]}; the cells are {', '.join(cells)}.")
    chosen = {name: cells[name] for name in cells if name in asked or name == "none"}
    bench, seconds = Bench(config), {name: [] for name in chosen}
    counts = {name: bench.count(reuse) for name, reuse in chosen.items()}
    for _ in range(config.repeats):
        for name, reuse in chosen.items():
            seconds[name].append(bench.time(reuse))
    commit, is_dirty = code_revision()
    facts = {"device": device_name(torch.device("cpu")), "dtype": "float32", "revision": commit, "is_dirty": is_dirty}
    rows = []
    for name, reuse in chosen.items():
        timed = {"wall_seconds": [wall for wall, _ in seconds[name]], "cpu_seconds": [cpu for _, cpu in seconds[name]]}
        row = {"cell": name, **asdict(config), **asdict(reuse), **counts[name], **timed, **facts}
        row |= ratios(row, rows[0] if rows else row)
        rows.append(row)
        settings = ("threshold", "sub_block_size", "batch_size", "limit")
        file = "-".join([name, *(f"{setting}={getattr(config, setting):g}" for setting in settings)])
        write_text(ROWS / f"{file}.json", json.dumps(row, indent=2) + "\n")
    print(markdown(table(rows)))


def ratios(row: dict, plain: dict) -> dict:
    """Return what a row saves and gains against the row `none`, per counted token; gains are lists, one per repeat."""

    def gain(name: str, repeat: int) -> float:
        return plain[name][repeat] / plain["timed_tokens"] * row["timed_tokens"] / row[name][repeat]

    def ratio(name: str) -> float:
        return plain[name] / plain["counted_tokens"] * row["counted_tokens"] / row[name]

    bound = ratio("weights" if row["batch_size"] == 1 else "operations")
    cpu_gains = [gain("cpu_seconds", repeat) for repeat in range(len(row["cpu_seconds"]))]
    return {
        "eligible_share": 1 - row["full_passes"] / row["denoise_passes"],
        "layers_saved": 1 - 1 / ratio("layers_run"),
        "rows_saved": 1 - 1 / ratio("rows_run"),
        "operations_bound": ratio("operations"),
        "weights_bound": ratio("weights"),
        "wall_gains": [gain("wall_seconds", repeat) for repeat in range(len(row["wall_seconds"]))],
        "cpu_gains": cpu_gains,
        "gain_over_bound": statistics.median(cpu_gains) / bound,
    }


def table(rows: list[dict]) -> list[list[str]]:
    """Return a heading and a line for each row, in the order of all_cells."""
    lines, order = [list(COLUMNS)], list(all_cells())
    for row in sorted(rows, key=lambda row: order.index(row["cell"])):
        shares = [f"{100 * row[name]:.1f} %" for name in ("eligible_share", "layers_saved", "rows_saved")]
        bounds = [f"{row[name]:.2f}" for name in ("operations_bound", "weights_bound")]
        gains = [_spread(row[name]) for name in ("wall_gains", "cpu_gains")]
        accuracy = f"{100 * row['accuracy']:.1f} %"
        lines.append([row["cell"], accuracy, *shares, *bounds, *gains, f"{row['gain_over_bound']:.2f}"])
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    run(TableConfig, measure)
