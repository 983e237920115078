"""From lm-eval's samples to scored problems: which metric a row's accuracy holds, and what each problem got."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdllm.evaluation.families import family_of


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """What lm-eval made of a task."""

    metric: str
    """Name of the metric that `correct` holds, with its filter."""
    metrics: dict[str, float]
    """Every metric that the task reports, as a mean over problems."""
    problems: list[dict[str, Any]]
    """One per problem: task, doc_id, split, prompt, response, answer, target, correct."""


def collect(task: str, samples: dict[str, list[dict[str, Any]]], final_prompt: Callable[[str, str], str]) -> TaskRun:
    """Return the problems of all member tasks with the value of the task's main metric for each.

    Args:
        samples: lm-eval's, by member task; final_prompt: (task, lm-eval's prompt) -> what the model really reads.
    """
    logged = [(name, sample) for name, members in samples.items() for sample in members]
    metric, filter_name = _primary_metric(task, logged)
    values: dict[str, list[float]] = {}
    for _, sample in logged:
        for name in sample["metrics"]:
            if isinstance(sample[name], int | float):  # others are lists that the task aggregates in its own way
                values.setdefault(f"{name},{sample['filter']}", []).append(float(sample[name]))
    problems = [
        {
            "task": name,
            "doc_id": sample["doc_id"],
            "split": sample["doc"].get("split"),
            "prompt": final_prompt(name, sample["arguments"][0][0]),
            "response": sample["resps"][0][0],
            "answer": sample["filtered_resps"][0],
            "target": sample["target"],
            "correct": float(sample[metric]),
        }
        for name, sample in logged
        if sample["filter"] == filter_name
    ]
    means = {name: sum(numbers) / len(numbers) for name, numbers in sorted(values.items())}
    return TaskRun(metric=f"{metric},{filter_name}", metrics=means, problems=problems)


def _primary_metric(task: str, logged: Sequence[tuple[str, dict[str, Any]]]) -> tuple[str, str]:
    """Return the (metric, filter) that a row's accuracy holds: the one named for the task's family, if the task has it,
    else its first."""
    preferred = preferred_metric(task)
    if preferred is not None:
        metric, filter_name = preferred
        if any(sample["filter"] == filter_name and metric in sample["metrics"] for _, sample in logged):
            return metric, filter_name
    first = logged[0][1]
    return first["metrics"][0], first["filter"]


def preferred_metric(task: str) -> tuple[str, str] | None:
    """Return the (metric, filter) named for the task's family, None for other tasks."""
    family = family_of(task)
    return (family.metric, family.filter_name) if family is not None else None


def wilson_interval(correct: float, number: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a proportion. Source: Wilson 1927, the score interval, z = 1.96."""
    z, share = 1.96, correct / number
    centre = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return (centre - spread) / (1 + z * z / number), (centre + spread) / (1 + z * z / number)


def score(correct: Sequence[float], splits: Sequence[str | None]) -> dict[str, Any]:
    """Return num_samples, accuracy in [0, 1], its binomial standard error, and the accuracy of each named split.

    Args:
        correct: one value in [0, 1] per problem; splits: the split of each problem, None where it has none.
    """
    accuracy = sum(correct) / len(correct)
    names = sorted({split for split in splits if split is not None})
    by_split = {name: [c for c, split in zip(correct, splits, strict=True) if split == name] for name in names}
    return {
        "num_samples": len(correct),
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(correct)),
        "accuracy_by_split": {name: sum(values) / len(values) for name, values in by_split.items()} or None,
    }
