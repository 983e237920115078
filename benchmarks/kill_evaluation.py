"""Does an evaluation that is killed again and again end with the row and the samples of an unbroken one?

    python benchmarks/kill_evaluation.py --kills 50 --device cpu --dtype float32

Evaluates data/tiny-adapted on tiny_problems once unbroken, then under kill -9: while it starts, a random time after a
random number of further samples was kept, after the last one, or while samples and row are written. Each finished run
must equal the unbroken one in every field of its row, but for times, and in every sample. Prints a line per kill and a
summary; exits 1 on a difference.
"""

import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from fastdllm.cli import run
from fastdllm.evaluation.run import EvaluateConfig, evaluate
from fastdllm.runtime import code_revision

ROOT = Path(__file__).parents[1]
PLACES = {"start": 1, "sample": 6, "end": 2, "files": 2}  # where a kill comes, and how often
TIMES = ("seconds", "decode_seconds", "tokens_per_second", "decode_tokens_per_second", "load_average", "clock_mhz")


@dataclass(frozen=True, kw_only=True)
class KillConfig:
    """What is evaluated, and how often it is killed."""

    kills: int = 50
    """Kills, 1 or more; another run is begun when one has finished before all are done."""
    limit: int = 24
    """Problems of a run."""
    batch_size: int = 4
    """Problems decoded together."""
    mode: Literal["auto", "ar"] = "auto"
    """auto: diffusion; ar: token by token."""
    engine: Literal["fastdllm", "transformers"] = "fastdllm"
    """transformers: its own generation loop, in mode ar."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    """Below float32 a batch of other problems can flip a token."""
    seed: int = 0
    """Seed of the times."""
    output_dir: str = "runs/kill_evaluation"
    """Folder of the run folders; must not be there yet."""

    def __post_init__(self):
        if self.kills < 1:
            raise ValueError(f"kills must be 1 or more, got {self.kills}.")


def make_config(config: KillConfig, name: str) -> EvaluateConfig:
    """Return the evaluation whose run folder is called `name`."""
    return EvaluateConfig(
        checkpoint=str(ROOT / "data" / "tiny-adapted"),
        task="tiny_problems",
        mode=config.mode,
        engine=config.engine,
        limit=config.limit,
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
        label="tiny",
        run=str(Path(config.output_dir).resolve() / name),
    )


def run_quietly(config: EvaluateConfig) -> None:
    """Evaluate, with all output in `output.txt` of the run folder."""
    os.chdir(ROOT)  # the task names its data from here
    Path(config.run).mkdir(parents=True, exist_ok=True)
    log = os.open(Path(config.run) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which a killed one leaves behind
    evaluate(config)


class Program:
    """An evaluation in a process of its own, forked from one that has only imported, so that it starts in a second."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdllm.evaluation.run"])

    def __init__(self, config: EvaluateConfig):
        self.folder = Path(config.run)
        self.process = self.context.Process(target=run_quietly, args=(config,))
        self.process.start()

    def num_kept(self) -> int:
        """Return the samples that are in the partial file now."""
        lines = [path.read_bytes().count(b"\n") - 1 for path in self.folder.glob("samples/*.partial.jsonl")]
        return max([0, *lines])

    def wait(self, condition: Any) -> bool:
        """Wait until `condition()`; return whether the process is still running."""
        while not condition():
            if not self.process.is_alive():
                return False
            time.sleep(0.001)
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self) -> float:
        """Wait for the end and return the seconds that took. Raises RuntimeError: the program failed."""
        since = time.monotonic()
        self.process.join()
        if self.process.exitcode:
            text = (self.folder / "output.txt").read_text()[-4000:]
            raise RuntimeError(f"the evaluation ended with {self.process.exitcode}:\n{text}")
        return time.monotonic() - since


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a finished run left behind: the fields of its row but for times, and its samples."""
    (row_file,) = (folder / "rows").glob("*.json")
    (samples_file,) = (folder / "samples").glob("*.samples.jsonl")
    row = {f"row {name}": value for name, value in json.loads(row_file.read_text()).items() if name not in TIMES}
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    fields = {f"sample {number} {name}": value for number, one in enumerate(samples) for name, value in one.items()}
    return {**row, **fields, "number of samples": len(samples)}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the names under which two outcomes do not hold the same."""
    missing = object()
    return [
        name for name in sorted(first.keys() | second.keys()) if first.get(name, missing) != second.get(name, missing)
    ]


def kill_once(program: Program, draw: random.Random, startup: float, config: KillConfig) -> str:
    """Kill the program at a random place and return which; "" if it ended before, or is left alone."""
    (place,) = draw.choices(list(PLACES), weights=PLACES.values())
    kept, samples_file = program.num_kept(), list(program.folder.glob("samples/*.samples.jsonl"))
    if kept == config.limit and draw.random() < 0.5:  # otherwise it would seldom finish
        return ""
    if place == "start" or (kept == config.limit and place != "files"):
        place = "start"
        time.sleep(draw.uniform(0, 2 * startup))
    elif place == "sample":
        wanted = min(config.limit, kept + draw.randint(1, max(1, config.limit // 4)))
        program.wait(lambda: program.num_kept() >= wanted)
        time.sleep(draw.uniform(0, 0.2))
    elif place == "end":
        program.wait(lambda: program.num_kept() == config.limit)
        time.sleep(draw.uniform(0, 0.5))
    else:
        program.wait(lambda: list(program.folder.glob("samples/*.samples.jsonl")) != samples_file)
        time.sleep(draw.uniform(0, 0.02))
    if not program.process.is_alive():
        return ""
    program.kill()
    return place


def run_broken(broken: EvaluateConfig, draw: random.Random, startup: float, places: Counter, config: KillConfig) -> int:
    """Start the run until it has finished, killing it while kills are left; return the number of starts."""
    starts = 0
    while True:
        program = Program(broken)
        starts += 1
        place = kill_once(program, draw, startup, config) if places.total() < config.kills else ""
        if not place:
            program.finish()
            return starts
        places[place] += 1
        row = "there" if any(program.folder.glob("rows/*.json")) else "not there"
        print(f"  kill {places.total()}: {place}, {program.num_kept()} samples kept, row {row}", flush=True)


def check(config: KillConfig) -> None:
    """Evaluate unbroken, then broken until all kills are done; print what came out."""
    output = Path(config.output_dir)
    if output.exists():
        raise ValueError(f"output_dir {output} exists; remove it or name another one.")
    draw, places, starts, runs, found = random.Random(config.seed), Counter(), 0, 0, []
    unbroken = make_config(config, "unbroken")
    program = Program(unbroken)
    since = time.monotonic()
    program.wait(program.num_kept)
    startup = time.monotonic() - since
    program.finish()
    expected = outcome(program.folder)
    print(f"unbroken in {time.monotonic() - since:.1f} s, {startup:.1f} s of it until the first sample", flush=True)
    while places.total() < config.kills:
        broken = make_config(config, f"broken-{runs}")
        starts += run_broken(broken, draw, startup, places, config)
        runs += 1
        changed = differences(expected, outcome(Path(broken.run)))
        found += changed
        print(f"run {runs} finished, {len(changed)} differences {changed[:5]}", flush=True)
    revision, is_dirty = code_revision()
    counts = ", ".join(f"{place} {places[place]}" for place in PLACES)
    print(f"{expected['row device']}, {expected['row dtype']}, {revision[:10]} dirty={is_dirty}")
    print(
        f"{places.total()} kills ({counts}), {starts} starts, {runs} finished runs of {config.limit} problems: "
        f"{len(expected)} fields compared in each, {len(found)} differences"
    )
    if found:
        sys.exit(1)


if __name__ == "__main__":
    run(KillConfig, check)
