"""Do `evaluate.py` and lm-eval's own command line give the same responses, problem by problem?

    python benchmarks/check_harness.py --offline DIR                       # gsm8k, minerva_math, ifeval: 50 problems
    python benchmarks/check_harness.py --tasks [tiny_problems] --limit 8   # on bundled data alone

Runs both commands on each task, lm-eval's with the model arguments of our row, and compares what the model read, what
it answered and the score of each answer. Prints a line per task; exits 1 on a difference. The limit is lm-eval's: that
many problems of each member of a group.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdllm.cli import run
from fastdllm.evaluation.families import CODE_TASKS, family_of
from fastdllm.evaluation.harness import PUBLISHED_EDITS, published_prompt
from fastdllm.evaluation.settings import harness_arguments

ROOT = Path(__file__).parents[1]
COMPARED = ("prompt", "response", "score")

Answers = dict[tuple[str, int], dict[str, Any]]
"""Prompt, response and score of each problem, by task and number."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is evaluated by both."""

    tasks: list[str] = field(default_factory=lambda: ["gsm8k", "minerva_math", "ifeval"])
    """Tasks, each on its own."""
    checkpoint: str = "data/tiny-adapted"
    """As `evaluate.py`'s."""
    offline: str = ""
    """Folder with evaluation data laid out by hub id; empty: the hub."""
    limit: int = 50
    """Problems of each task, and of each member of a group."""
    max_new_tokens: int = 128
    """Most new tokens of an answer."""
    batch_size: int = 32
    """Problems decoded together."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    allow_code_execution: bool = False
    """For tasks that run what the model wrote."""
    output_dir: str = "runs/check_harness"
    """Folder for what both write; must not be there yet."""

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")


def shared_flags(config: CheckConfig, task: str) -> list[str]:
    """Return the flags that both commands know."""
    offline = ["--offline", str(Path(config.offline).resolve())] if config.offline else []
    return [*offline, *(["--allow_code_execution"] if config.allow_code_execution and task in CODE_TASKS else [])]


def call(command: list[str], log: Path) -> None:
    """Run a Python command at the repository's root, its output in `log`. Raises RuntimeError: it failed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")


def ask_evaluate(config: CheckConfig, task: str, folder: Path) -> tuple[dict[str, Any], Answers]:
    """Run evaluate.py and return its row and answers."""
    command = ["evaluate.py", "--checkpoint", config.checkpoint, "--task", task, "--run", str(folder)]
    for name in ("limit", "max_new_tokens", "batch_size", "device"):
        command += [f"--{name}", str(getattr(config, name))]
    call([*command, *shared_flags(config, task)], folder / "evaluate.txt")
    (row,) = [json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")]
    (samples,) = (folder / "samples").glob("*.samples.jsonl")
    answers = {}
    for line in samples.read_text().splitlines():
        problem = json.loads(line)
        found = {"prompt": problem["prompt"], "response": problem["response"], "score": problem["correct"]}
        answers[problem["task"], problem["doc_id"]] = found
    return row, answers


def ask_lm_eval(config: CheckConfig, task: str, row: Mapping[str, Any], folder: Path) -> Answers:
    """Run lm-eval's command line with the model arguments of `row` and return its answers."""
    arguments = {"model_path": config.checkpoint, **harness_arguments(row["config"])}
    family = family_of(task)
    command = ["-m", "fastdllm.evaluation.harness", "run", "--model", "fast_dllm_v2", "--tasks", task]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--limit", str(config.limit), "--log_samples", "--output_path", str(folder / "lm_eval")]
    if family is None or not family.is_completion:
        command += ["--apply_chat_template", "--fewshot_as_multiturn", "true"]
    if any(task.startswith(name) for name in PUBLISHED_EDITS):
        command += ["--num_fewshot", "0"]
    if family is None or not family.folders:
        command += ["--include_path", "data/tiny/tasks"]
    call([*command, *shared_flags(config, task)], folder / "lm_eval.txt")
    metric, filter_name = row["metric"].split(",")
    answers = {}
    for path in (folder / "lm_eval").rglob("samples_*.jsonl"):
        member = path.stem.removeprefix("samples_").rsplit("_", 1)[0]
        for sample in map(json.loads, path.read_text().splitlines()):
            if sample["filter"] == filter_name:
                asked = published_prompt(member, sample["arguments"]["gen_args_0"]["arg_0"])
                found = {"prompt": asked, "response": sample["resps"][0][0], "score": float(sample[metric])}
                answers[member, sample["doc_id"]] = found
    return answers


def compare(ours: Answers, theirs: Answers) -> dict[str, list[tuple[str, int]]]:
    """Return the problems in which prompt, response or score differ, and those that only one has."""
    both = ours.keys() & theirs.keys()
    different = {name: [key for key in sorted(both) if ours[key][name] != theirs[key][name]] for name in COMPARED}
    return different | {"missing": sorted(ours.keys() ^ theirs.keys())}


def check(config: CheckConfig) -> None:
    """Evaluate each task with both, print what came out, and exit with status 1 if anything differs."""
    output = Path(config.output_dir).resolve()
    if output.exists():
        raise ValueError(f"output_dir {config.output_dir} exists; remove it or name another one.")
    has_failed = False
    for task in config.tasks:
        folder = output / task
        folder.mkdir(parents=True)
        row, ours = ask_evaluate(config, task, folder)
        theirs = ask_lm_eval(config, task, row, folder)
        different = compare(ours, theirs)
        counts = ", ".join(f"{len(ours) - len(different[name])} equal {name}s" for name in COMPARED)
        texts = len({answer["response"] for answer in ours.values()})
        print(
            f"{task}: {len(ours)} problems, {len(theirs)} of lm-eval's; {counts}; {texts} different responses, "
            f"{row['counted_tokens']} tokens; {row['metric']} {100 * row['accuracy']:.1f} %",
            flush=True,
        )
        for name, keys in different.items():
            if keys:
                print(f"  {name}: {', '.join(f'{member} {number}' for member, number in keys[:10])}")
        has_failed |= not ours or any(different.values())
    print(f"{config.checkpoint}, {row['device']}, {row['dtype']}, {row['revision'][:10]} dirty={row['is_dirty']}")
    if has_failed:
        sys.exit(1)


if __name__ == "__main__":
    run(CheckConfig, check)
