"""The whole method on two CPU cores: adapt the bundled model, evaluate it, and draw what came out. `make demo`."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastdllm.cli import parse, run
from fastdllm.demo.view import ViewConfig, view
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.plots import draw_accuracy
from fastdllm.evaluation.results import Row, print_table
from fastdllm.evaluation.run import run_missing
from fastdllm.training.config import TrainConfig
from fastdllm.training.run import train

TRAIN_CONFIG = "configs/demo.yaml"
RUN = "runs/demo"
PROBLEMS = "data/word_problems/problems.py"  # a program of the repository, not of the package
TASK = "tiny_problems"
TRACES = 2  # of each measurement
AUTOREGRESSIVE, ADAPTED = "data/tiny", "data/tiny-adapted"
LEGEND = f"""tiny: {AUTOREGRESSIVE}, the bundled autoregressive model; tokens seen are those of the adaptation
demo: {AUTOREGRESSIVE} adapted just now by {TRAIN_CONFIG}, on far fewer tokens than arithmetic needs to survive
tiny-adapted: {ADAPTED}, the bundled result of configs/tiny_full.yaml"""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo may leave out."""

    limit: int = 0
    """Problems that are evaluated; 0: all 200."""
    fresh: bool = False
    """Adapt and evaluate anew; otherwise only what is missing runs."""


def run_demo(config: DemoConfig) -> list[Row]:
    """Run every step that has no result yet; print the table, draw the figure, and return the table's rows."""
    started = time.perf_counter()
    with step("1/6", "writing the training problems (data/tiny-source)"):
        if not Path("data/tiny-source/train.jsonl").exists():
            subprocess.run([sys.executable, PROBLEMS], check=True)
    with step("2/6", f"adapting {AUTOREGRESSIVE} to block diffusion for a few minutes ({TRAIN_CONFIG})"):
        train(parse(TrainConfig, ["--config", TRAIN_CONFIG, *(["--fresh"] if config.fresh else [])]))
    measure = _measure(config)
    with step("3/6", f"evaluating {AUTOREGRESSIVE} token by token: the AR baseline"):
        rows = measure(checkpoint=AUTOREGRESSIVE)
    with step("4/6", "evaluating the model adapted just now"):
        rows += measure(checkpoint=f"{RUN}/export", threshold=0.9)
    with step("5/6", f"evaluating {ADAPTED}, adapted in full: threshold 1.0 and 0.9, and layer reuse"):
        rows += measure(checkpoint=ADAPTED, threshold=1.0)
        rows += measure(checkpoint=ADAPTED, threshold=0.9, grid=True)
    with step("6/6", "table and figure"):
        # rows kept from an earlier state of the code are shown, in a column of their own
        print_table(rows, show_mixed_revisions=True)
        figure = draw_accuracy(rows, f"{RUN}/figure.png", show_mixed_revisions=True)
    print(LEGEND)
    page = view(ViewConfig(sources=[RUN]))
    print(f"watch the answers appear, AR beside diffusion: open {page} in a browser")
    print(f"figure: {figure}; rows: {RUN}/rows; curves: tensorboard --logdir runs")
    print(f"to go on: . .venv/bin/activate, then python -m fastdllm chat --checkpoint {ADAPTED}; README.md has more")
    print(f"demo finished in {(time.perf_counter() - started) / 60:.1f} minutes")
    return rows


@contextmanager
def step(number: str, what: str):
    """Announce a step, and print how long it took."""
    print(f"\n== {number} {what}", flush=True)
    started = time.perf_counter()
    yield
    print(f"== {number} took {time.perf_counter() - started:.0f} s", flush=True)


def _measure(config: DemoConfig) -> Callable[..., list[Row]]:
    def measure(**settings) -> list[Row]:
        shared = {"run": RUN, "task": TASK, "device": "cpu", "limit": config.limit}
        shared["trace"] = min(TRACES, config.limit or TRACES)
        return run_missing(EvaluateConfig(**settings, **shared, force="all" if config.fresh else ""))

    return measure


if __name__ == "__main__":
    run(DemoConfig, run_demo)
