"""How fast is a decoding pass, and how many tokens a second does an answer give? For one GPU; under 9 minutes.

    python benchmarks/decode_speed.py [--cells '[qwen2.5-1.5b/*]'] [--published FOLDER]
    python benchmarks/decode_speed.py --cells '[qwen2.5-1.5b/full/32x1/c512]' --profile
    python benchmarks/decode_speed.py --report       # rows -> the tables and the figure of results.md
    python benchmarks/decode_speed.py --cells '[tiny/*b1]' --new_tokens 64 --output /tmp/rows      # on a CPU

Random weights of real shapes, random prompts. A cell is one of
    SHAPE/KIND/ROWSxBATCH/cCONTEXT   one pass of the engine: token (AR), sub_block, full or append; head, sampling and
                                     the host's part of the pass included, the host's reading of its result not
    SHAPE/answers/ENGINE/bBATCH      whole answers of a fixed length. Denoising steps reveal what `trace` says, so that
                                     engines are compared at equal tokens per forward (see replay.py)
    SHAPE/reuse/WAY/bBATCH           the same of our engine with layers or rows reused; not in the default set
    SHAPE/verified/DRAFTS/bBATCH     the same by policy verified with a random adapter of rank 64: d4, d7, ..., chosen;
                                     `acceptance` or `accepted` say how many drafts are; not in the default set
    SHAPE/verify/ROWSxBATCH/cCONTEXT one verifying pass; what drafts.PASS_COSTS holds is printed; not in the default set
Engines: `fastdllm`, `fastdllm_ar`, `transformers` (its own `generate`), `transformers_compiled` (static cache,
torch.compile) and, with its FOLDER, `published` (**which runs the code in it**, as check_published.py does).

The floor of a pass is the time to read all weights and the visible keys and values once, at the device's copy rate
(measured first; the rate of reading alone is beside it). Answers are measured in rounds, every cell once a round; a
measurement that would end after `minutes` is left out, and what got none is printed.
"""

import gc
import statistics
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from decode_answers import AnswerCell  # beside this file
from decode_bench import BLOCK_SIZE, DRAFTS, PLANS, REUSES, SUB_BLOCK_SIZE, Bench, Cell, spread
from decode_report import add_speed_ups, pass_costs, print_rows, write_report, write_row
from kernel_table import print_kernels
from replay import check_trace, draw_accepted
from shapes import SHAPES

from fastdllm.cli import run
from fastdllm.decoding.rows import Row

ENGINES = ("fastdllm", "fastdllm_ar", "transformers", "transformers_compiled", "published")
BATCH_SIZES, CONTEXTS, MOST_ROWS = (1, 8, 32, 128), (128, 512, 2048), 4096
# 13 denoising steps and an append for 32 tokens, four of the steps full passes: about 2.3 tokens per forward
TRACE = [3, 2, 2, 3, 3, 2, 4, 2, 2, 3, 2, 2, 1]
ANSWERS_SHARE = 0.4  # of the time, which passes leave to answers
COMPILE_SECONDS = 90  # what a first compilation of transformers may take


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Measure decoding, cell by cell."""

    cells: list[str] = field(default_factory=list)
    """Names of cells, * and ? allowed; empty: the default set."""
    trace: list[int] = field(default_factory=lambda: list(TRACE))
    """Tokens revealed in each denoising step of a block, 31 of 32 in all."""
    acceptance: float = 0.8
    """Of verified answers: the chance that a draft behind right ones is right, in [0, 1)."""
    accepted: str = ""
    """An acceptance row of lossless.py, whose numbers of accepted drafts are replayed instead; none if empty."""
    prompt_tokens: int = 128
    """Random tokens of each prompt."""
    new_tokens: int = 256
    """Tokens of each answer; stop tokens do not stop it."""
    repeats: int = 3
    """Rounds in which answers are measured."""
    graphs: bool = True
    """Replay our passes as CUDA graphs, on a GPU."""
    fused: bool = True
    """Run our fused forward pass with Triton's kernels, on a GPU; else transformers' layers."""
    passes: int = 20
    """Timed passes of a cell of passes."""
    minutes: float = 8.5
    """No measurement goes on after so long, compilation included."""
    published: str = ""
    """Folder with the published Python files, which are run; it adds their cells to the default set."""
    profile: bool = False
    """Print where the time of one pass goes, kernel by kernel, for each chosen cell of passes; no rows are written."""
    report: bool = False
    """Measure nothing; write the tables of results.md and its figure from the rows."""
    output: str = "experiments/02_decode_speed/rows"
    """Folder of the rows."""

    def __post_init__(self):
        check_trace(self.trace, BLOCK_SIZE, SUB_BLOCK_SIZE)
        draw_accepted(self.acceptance, self.accepted)  # refuses what cannot be replayed
        for name in ("prompt_tokens", "new_tokens", "repeats", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.prompt_tokens % BLOCK_SIZE or self.new_tokens % BLOCK_SIZE:
            raise ValueError(
                f"prompt_tokens and new_tokens must be whole blocks of {BLOCK_SIZE}, which the trace fills, got "
                f"{self.prompt_tokens} and {self.new_tokens}."
            )
        answers = [cell.name for cell in chosen_cells(self) if cell.has_answers]
        if self.profile and answers:
            raise ValueError(f"only passes can be profiled, not {answers[0]}; choose cells such as '*/full/32x1/*'.")


def measure_pass(bench: Bench, cell: Cell, num_passes: int, is_profiled: bool) -> dict[str, Any] | None:
    """Return the row of a cell of passes, or None if it was profiled instead."""
    engine = bench.engine(cell)

    def warm_up() -> list[Row]:
        rows = engine.fill(cell)
        for _ in range(3):
            engine.reset()
            engine.advance(rows)
        return rows

    warmup_seconds, peak_bytes, rows = bench.peak(warm_up)
    if is_profiled:
        engine.reset()
        print(f"\n{cell.name}")
        return print_kernels(lambda: engine.advance(rows), bench.device)
    times = []
    for _ in range(num_passes):
        engine.reset()
        times.append(bench.elapsed(lambda: engine.advance(rows)))
    engine.check_pass(rows)
    own = {"sub_block": BLOCK_SIZE, "token": 0}.get(cell.kind, cell.rows)  # places seen besides the context
    return bench.row(
        cell,
        statistics.median(times),
        cell.context + own,
        peak_bytes,
        repeats=len(times),
        spread=spread(times),
        capture_seconds=getattr(engine, "capture_seconds", 0.0),  # not every engine captures
        warmup_seconds=warmup_seconds,
    )


def all_cells(shape: str) -> list[Cell]:
    """Return every cell of a shape that makes sense: up to 4,096 rows in a pass, contexts of whole blocks."""
    kinds = [("token", 1), ("sub_block", SUB_BLOCK_SIZE), ("full", 32), ("append", 32), ("full", 64), ("full", 128)]
    kinds += [("verify", rows) for rows in PLANS]
    passes = [
        Cell(shape, kind, "fastdllm_ar" if kind == "token" else "fastdllm", rows, batch_size, context)
        for kind, rows in kinds
        for batch_size in BATCH_SIZES
        for context in CONTEXTS
        if rows * batch_size <= MOST_ROWS
    ]
    answers = [Cell(shape, "answers", engine, 0, size, 0) for engine in ENGINES for size in BATCH_SIZES]
    ways = [("reuse", way) for way in REUSES] + [("verified", drafts) for drafts in DRAFTS]
    return passes + answers + [Cell(shape, kind, way, 0, size, 0) for kind, way in ways for size in BATCH_SIZES]


def is_default(cell: Cell, published: str) -> bool:
    """Whether the default set has the cell: what is slow and changes little from batch to batch is there but once."""
    if cell.shape == "tiny" or cell.kind in ("reuse", "verified", "verify"):
        return False
    if cell.kind != "answers":
        is_usual = cell.kind != "append" and cell.rows <= BLOCK_SIZE
        return is_usual or cell.context == 512
    if cell.engine.startswith("transformers"):
        return cell.batch_size == 1 or (cell.batch_size == 32 and cell.shape == "qwen2.5-1.5b")
    return cell.engine != "published" or bool(published)


def chosen_cells(config: SpeedConfig) -> list[Cell]:
    """Return the cells that the config names. Raises ValueError for a name that fits none, or lacks what it needs."""
    cells = [cell for shape in SHAPES for cell in all_cells(shape)]
    if not config.cells:
        return [cell for cell in cells if is_default(cell, config.published)]
    for pattern in config.cells:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(f"no cell is called {pattern!r}; there are {cells[0].name}, {cells[-1].name} and such.")
    named = [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in config.cells)]
    if named and not config.published and all(cell.engine == "published" for cell in named):
        raise ValueError(f"{named[0].name} needs --published FOLDER.")
    return [cell for cell in named if cell.engine != "published" or config.published]


def measure(config: SpeedConfig) -> None:
    """Measure the chosen cells, write their rows and print them as a table; or profile them, or write the report."""
    if config.report:
        return write_report(Path(config.output))
    cells = chosen_cells(config)
    passes, answers = ([cell for cell in cells if cell.has_answers == flag] for flag in (False, True))
    torch.set_float32_matmul_precision("high")
    written = asdict(config) | {"output": Path(config.output).name}  # no path of this machine
    bench, rows = Bench(config.trace, 60 * config.minutes, written), {}
    kept_free = ANSWERS_SHARE * 60 * config.minutes if answers else 0.0
    for cell in passes:
        row = measure_pass(bench, cell, config.passes, config.profile) if bench.has_time(kept_free) else None
        if row:
            rows[cell.name] = row
            write_row(config.output, row)
            print(f"{cell.name:<36} {row['ms_per_forward']:8.3f} ms", flush=True)
        free_memory()
    running = []
    for cell in sorted(answers, key=lambda cell: cell.engine == "transformers_compiled"):
        if bench.has_time(COMPILE_SECONDS * (cell.engine == "transformers_compiled")):
            running.append(AnswerCell(bench, cell, config.prompt_tokens, config.new_tokens, config.published))
            print(f"{cell.name:<36} warm after {running[-1].warmup_seconds:.1f} s", flush=True)
    for number in range(config.repeats):
        for answer in running[:: -1 if number % 2 else 1]:
            if bench.has_time(answer.results[-1].seconds if answer.results else 0.0):
                answer.measure()
                rows[answer.cell.name] = answer.row()
                write_row(config.output, rows[answer.cell.name])
    if config.profile:
        return
    for row in add_speed_ups(list(rows.values())):
        write_row(config.output, row)
    for shape, costs in pass_costs(list(rows.values())).items():
        print(f"PASS_COSTS of {shape}: {tuple(costs)}")
    print_rows(list(rows.values()))
    left_out = [cell.name for cell in cells if cell.name not in rows]
    print(f"{time.perf_counter() - bench.started:.0f} s. " + (f"Left out: {', '.join(left_out)}." if left_out else ""))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run(SpeedConfig, measure)
