"""How many document tokens a second does training take in, by layout of its rows?

    python benchmarks/train_throughput.py [--cells '[qwen2.5-1.5b/shared]'] [--devices 2 --strategy deepspeed_stage_1]

Random weights of real shapes, random tokens from a memory map, the project's own LightningModule, data module and
strategies; data, loss and optimizer are in the time. One row for each cell goes to `--output`.

Layouts: `published` (two clean halves, all logits, uncompiled layers recomputed in full, mask built at each step),
`published_fast` (the same rows on our kernels), `shared` (one clean half), `dead_rows` (documents of 512 tokens, 30 %
of them prompt, dead rows left out), `ar` (plain next-token fine-tuning, the ceiling), `draft` (a gated adapter of rank
64 on frozen weights, one row of windows for each token).
"""

import gc
import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from published_layout import PublishedPass  # beside this file
from shapes import MASK_TOKEN_ID, SHAPES, random_qwen

from fastdllm.adapter import AdapterSettings, add_adapter
from fastdllm.cli import run
from fastdllm.data.datamodule import AdaptDataModule, DataConfig
from fastdllm.data.packing import Objective
from fastdllm.draft import DraftConfig
from fastdllm.model import BlockDiffusionLM, Recompute
from fastdllm.objective import ObjectiveConfig
from fastdllm.runtime import (
    code_revision,
    device_name,
    get_optimal_dtype,
    library_versions,
    peak_flops,
    pick_device,
    write_text,
)
from fastdllm.training.config import DTYPES
from fastdllm.training.meter import add_over_processes
from fastdllm.training.module import AdaptModule, OptimizerConfig
from fastdllm.training.requeue import StopOnSignal
from fastdllm.training.strategies import StrategyName, lightning_precision, make_strategy, resolve_strategy

# Samples at a time: the same rows in every layout, as many as fit into 80 GB; published has fewer, to end in time.
MICRO_BATCHES = {
    "qwen2.5-0.5b": {"published": 4, "published_fast": 6, "shared": 8, "dead_rows": 2, "ar": 24, "draft": 24},
    "qwen2.5-1.5b": {"published": 2, "published_fast": 3, "shared": 4, "dead_rows": 1, "ar": 12, "draft": 12},
    "tiny": {"published": 1, "published_fast": 1, "shared": 1, "dead_rows": 1, "ar": 1, "draft": 1},
}
LAYOUTS = ("published", "published_fast", "shared", "dead_rows", "ar", "draft")
DOCUMENT_LENGTH, PROMPT_SHARE = 512, 0.3  # of the chat-shaped packs
# Chat-shaped documents of one length leave a fifth of a 6,144-row sample empty; real lengths differ and fill it. So
# their samples are so many times longer, and as many times fewer.
CHAT_SAMPLE_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Measure training throughput, cell by cell."""

    cells: list[str] = field(default_factory=lambda: [f"{s}/{x}" for s in list(SHAPES)[:2] for x in LAYOUTS])
    """What to measure, as shape/layout."""
    steps: int = 50
    """Optimizer steps measured."""
    warmup: int = 4
    """Optimizer steps before them, which also compile."""
    sample_length: int = 2048
    """Tokens of a sample."""
    micro_batch_size: int = 0
    """Samples at a time; 0 for what fits into 80 GB."""
    accumulate: int = 1
    """Micro-batches of an optimizer step. With 1, the optimizer weighs most."""
    recompute: Recompute = "selective"
    """As in training; the layout published always recomputes whole layers."""
    compile: bool = True
    """Compile layers (not those of the layout published); takes effect on CUDA."""
    devices: int = 1
    """GPUs of this host, or CPU processes."""
    strategy: StrategyName = "auto"
    """As in training."""
    output: str = "experiments/01_training_throughput/rows"
    """Folder of the rows."""
    label: str = ""
    """Added to the rows' names, for variants."""
    profile: bool = False
    """Print where the time of one optimizer step goes."""


@dataclass(frozen=True)
class Cell:
    shape: str
    layout: Literal["published", "published_fast", "shared", "dead_rows", "ar", "draft"]


class RandomData(AdaptDataModule):
    """Serves the documents of one folder, which are tokens already."""

    def __init__(self, folder: Path, *arguments, **options):
        super().__init__(*arguments, **options)
        self.folder = folder

    def prepare_data(self) -> None:
        self._folders = [self.folder]
        self._open()


class Stopwatch(Callback):
    """Times the optimizer steps after the warm-up, and what the data made them wait."""

    def __init__(self, warmup: int, steps: int, is_profiled: bool):
        self.warmup, self.last, self.is_profiled = warmup, warmup + steps, is_profiled
        self.marks: dict[int, tuple[float, list[float]]] = {}
        self.waited, self._idle_since, self.losses = 0.0, 0.0, []
        self.profiler = None

    def on_train_start(self, trainer, module) -> None:
        self._mark(0, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.warmup in self.marks:
            self.waited += time.perf_counter() - self._idle_since

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        self.losses.append(module.step_loss.clone())
        if step in (self.warmup, self.last) and step not in self.marks:
            self._mark(step, module)
        if self.is_profiled and step == self.warmup - 2 and self.profiler is None:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.is_profiled and step == self.warmup - 1:
            self.profiler.stop()
        self._idle_since = time.perf_counter()

    def on_train_end(self, trainer, module) -> None:
        accumulate = trainer.accumulate_grad_batches
        self.losses = add_over_processes(torch.stack(self.losses[accumulate - 1 :: accumulate])).tolist()  # of steps

    def _mark(self, step: int, module) -> None:
        counters = add_over_processes(module.counters).tolist() if step else []  # none yet at the start
        if module.device.type == "cuda":
            torch.cuda.synchronize()
            if step == self.warmup:
                torch.cuda.reset_peak_memory_stats()
        self.marks[step] = (time.perf_counter(), counters)


def measure(config: ThroughputConfig) -> None:
    """Measure all cells and print them as a table."""
    lines = []
    for name in config.cells:
        shape, _, layout = name.partition("/")
        if shape not in SHAPES or layout not in LAYOUTS:
            raise ValueError(f"cell {name!r} must be shape/layout of {sorted(SHAPES)} and {list(LAYOUTS)}.")
        row, is_first = _measure(Cell(shape, layout), config)
        if is_first:
            suffix = f"-{config.label}" if config.label else ""
            write_text(Path(config.output) / f"{shape}-{layout}{suffix}.json", json.dumps(row, indent=1) + "\n")
            lines.append(_line(row))
            print(lines[-1], flush=True)
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print("\n".join(lines), flush=True)


def _measure(cell: Cell, config: ThroughputConfig) -> tuple[dict, bool]:
    device = pick_device()
    torch.set_float32_matmul_precision("high")
    precision = next(name for name, dtype in DTYPES.items() if dtype == get_optimal_dtype(device)[0])
    strategy = resolve_strategy(config.strategy, config.devices)
    if cell.layout == "dead_rows":
        config = replace(config, sample_length=CHAT_SAMPLE_FACTOR * config.sample_length)
    micro_batch_size = config.micro_batch_size or MICRO_BATCHES[cell.shape][cell.layout]
    objective = _objective(cell.layout)
    module = _module(cell, config, objective, device, DTYPES[precision])
    watch = Stopwatch(config.warmup, config.steps, config.profile)
    with tempfile.TemporaryDirectory() as folder:
        _write_documents(Path(folder), cell.layout, config, micro_batch_size)
        data = RandomData(
            Path(folder),
            DataConfig(path=folder, sample_length=config.sample_length),
            None,
            mask_token_id=MASK_TOKEN_ID,
            objective=objective,
            seed=0,
            micro_batch_size=micro_batch_size,
        )
        trainer = Trainer(
            accelerator=device.type,
            devices=config.devices,
            strategy=make_strategy(strategy, device.type, config.devices),
            precision=lightning_precision(precision, strategy),
            max_steps=config.warmup + config.steps,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            callbacks=[StopOnSignal(), watch],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, data)
    if watch.profiler is not None:
        print(
            watch.profiler.key_averages().table(
                sort_by="self_device_time_total", row_limit=70, max_name_column_width=90
            )
        )
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return _row(cell, config, micro_batch_size, module, strategy, watch, device, peak), trainer.is_global_zero


def _objective(layout: str) -> Objective:
    if layout == "draft":
        return DraftConfig()
    if layout == "ar":
        return ObjectiveConfig(kind="autoregressive")
    return ObjectiveConfig(drop_dead_rows=layout == "dead_rows")


def _module(cell: Cell, config: ThroughputConfig, objective, device, dtype) -> AdaptModule:
    model = _model(cell, device, dtype)
    is_plain = cell.layout == "published"
    is_compiled = config.compile and device.type == "cuda" and not is_plain
    recompute = "full" if is_plain else config.recompute if is_compiled else "none"
    module = AdaptModule(
        model,
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=1e-5),
        max_steps=config.warmup + config.steps,
        log_every=10**9,
        sample_length=config.sample_length,
        compute_dtype=dtype,
        compile_layers=is_compiled,
        recompute=recompute,
    )
    if cell.layout.startswith("published"):
        module.scoring = PublishedPass(model.train(), objective, config.sample_length, is_plain)
    return module


def _model(cell: Cell, device: torch.device, dtype: torch.dtype) -> BlockDiffusionLM:
    qwen = random_qwen(cell.shape, device)
    if cell.layout != "draft":
        return BlockDiffusionLM(qwen, mask_token_id=MASK_TOKEN_ID)
    for parameter in qwen.parameters():  # frozen: kept in what is computed in; not the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    model = BlockDiffusionLM(qwen, mask_token_id=MASK_TOKEN_ID, context_attention="causal")
    add_adapter(model, AdapterSettings(), seed=0)
    return model


def _write_documents(folder: Path, layout: str, config: ThroughputConfig, micro_batch_size: int) -> None:
    """Write documents for every sample of the run: as long as a sample and all supervised, or chat-shaped."""
    is_chat = layout == "dead_rows"
    length = min(DOCUMENT_LENGTH, config.sample_length) if is_chat else config.sample_length
    samples = (config.warmup + config.steps) * config.accumulate * config.devices * micro_batch_size
    count = samples * (2 * config.sample_length // length if is_chat else 1)
    generator = np.random.default_rng(0)
    generator.integers(0, 50_000, count * length).astype(np.int32).tofile(folder / "tokens.int32")
    is_response = np.arange(length) >= (PROMPT_SHARE * length if is_chat else 0)
    np.tile(is_response, count).astype(np.uint8).tofile(folder / "is_response.uint8")
    (np.arange(count + 1) * length).astype(np.int64).tofile(folder / "offsets.int64")
    write_text(folder / "meta.json", json.dumps({"source": "random", "documents": count}))


def _row(cell, config, micro_batch_size, module, strategy, watch: Stopwatch, device, peak_bytes: int) -> dict:
    (started, before), (ended, after) = watch.marks[config.warmup], watch.marks[watch.last]
    seconds = ended - started
    tokens, rows, operations, empty = (now - then for now, then in zip(after, before, strict=True))
    peak = peak_flops(device)
    commit, is_dirty = code_revision()
    return {
        "shape": cell.shape,
        "layout": cell.layout,
        "strategy": strategy,
        "devices": config.devices,
        "data_tokens_per_second": tokens / seconds,
        "rows_per_second": rows / seconds,
        "mfu": operations / seconds / (peak * config.devices) if peak else None,
        "teraflops_per_device": operations / seconds / config.devices / 1e12,
        "peak_memory_gb": peak_bytes / 1e9,
        "rows_per_token": rows / tokens,
        "empty_row_share": empty / rows,
        "data_wait_share": watch.waited / seconds,
        "steps": config.steps,
        "seconds": seconds,
        "data_tokens": tokens,
        "rows": rows,
        "operations": operations,
        "warmup_seconds": started - watch.marks[0][0],
        "micro_batch_size": micro_batch_size,
        "recompute": module.recompute,
        "is_compiled": module.compile_layers,
        "losses": watch.losses,
        "device": device_name(device),
        "revision": commit,
        "is_dirty": is_dirty,
        "versions": library_versions(),
        "config": asdict(config) | {"output": Path(config.output).name},
    }


def _line(row: dict) -> str:
    return (
        f"{row['shape']:<13} {row['layout']:<15} {row['strategy']:<18} x{row['devices']} mb{row['micro_batch_size']:<3}"
        f"{row['data_tokens_per_second']:>9,.0f} tok/s {row['rows_per_second']:>9,.0f} rows/s  "
        f"MFU {row['mfu'] or 0:.3f}  {row['peak_memory_gb']:5.1f} GB  wait {row['data_wait_share']:.4f}  "
        f"empty {row['empty_row_share']:.3f}  warm-up {row['warmup_seconds']:.0f} s  "
        f"losses {row['losses'][0]:.5f} .. {row['losses'][-1]:.5f}"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*(LeafSpec|context_fn|gradient clipping).*")
    run(ThroughputConfig, measure)
