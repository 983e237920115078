"""Tasks for `evaluate.py`: the project's own and lm-eval's, with data from the hub or from local files."""

import difflib
import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

LOCAL_TASKS = Path("data/tiny/tasks")
OFFLINE_DATA = {"gsm8k": "openai/gsm8k", "minerva_math": "EleutherAI/hendrycks_math"}
OFFLINE_DATA |= {"minerva_math500": "HuggingFaceH4/MATH-500", "ifeval": "google/IFEval"}
LIKELIHOOD_TYPES = ("loglikelihood", "multiple_choice")


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task or group, with its data."""

    name: str
    manager: TaskManager
    members: dict[str, Task]
    """lm-eval's tasks by name: one, or those of the group."""
    wanted: list[Any]
    """What lm-eval is asked to evaluate."""

    @property
    def is_likelihood(self) -> bool:
        """Whether any member compares log-likelihoods."""
        return any(member.OUTPUT_TYPE in LIKELIHOOD_TYPES for member in self.members.values())


def load_task(task: str, offline: str = "") -> LoadedTask:
    """Return an lm-eval task (or group) and its data.

    Args:
        offline: folder with data laid out by hub id; "": the hub.
    Raises:
        ValueError, FileNotFoundError: no such task or data.
    """
    manager, wanted = find_task(task, offline)
    random.seed(0)  # the seeds under which lm-eval loads tasks: some shuffle their choices then
    np.random.seed(1234)
    loaded = manager.load([wanted])
    tops = list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())  # the outermost group comes first
    return LoadedTask(name=task, manager=manager, members=loaded["tasks"], wanted=tops)


def find_task(task: str, offline: str = "") -> tuple[TaskManager, str | dict[str, Any]]:
    """Return a manager and what to ask it for: the project's own task, lm-eval's, or lm-eval's with local data.

    Raises:
        ValueError: no such task, or `offline` knows no folder for its data. FileNotFoundError: the folder is not there.
    """
    local = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=False) if LOCAL_TASKS.is_dir() else None
    own = local.all_tasks if local is not None else []
    if local is not None and task in own:
        return local, task
    data = offline_folder(task, offline) if offline else None
    manager = _stock_tasks()
    if task not in manager.all_tasks:
        nearest = difflib.get_close_matches(task, [*own, *manager.all_tasks], n=1)
        listing = "`python -m fastdllm.evaluation.harness ls tasks` lists them."
        raise ValueError(f"unknown task {task!r}; {f'did you mean {nearest[0]}?' if nearest else listing}")
    if data is None:
        return manager, task
    known = manager.all_subtasks
    members = [task] if task in known else [name for name in known if name.startswith(f"{task}_")]
    return manager, {"group": f"{task}_offline", "task": [{"task": name, "dataset_path": data} for name in members]}


@functools.cache
def _stock_tasks() -> TaskManager:
    return TaskManager()  # indexes 14,000 files: many seconds, so once per process


def offline_folder(task: str, offline: str) -> str:
    """Return the folder below `offline` with the data of a stock task.

    Raises:
        ValueError: the task's data has no known folder. FileNotFoundError: it is not there.
    """
    family = max((name for name in OFFLINE_DATA if task.startswith(name)), key=len, default=None)
    if family is None:
        raise ValueError(f"offline knows the data folders of {', '.join(OFFLINE_DATA)}, got task {task!r}.")
    data = Path(offline, OFFLINE_DATA[family]).resolve()
    if not data.is_dir():
        raise FileNotFoundError(f"offline: task {task} needs the folder {data}, which is not there; see --help.")
    return str(data)
