"""Tasks by name: the project's own and lm-eval's, with data from the hub or local files, checked before they run."""

import contextlib
import difflib
import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import nltk
import numpy as np
from datasets import get_dataset_config_names
from datasets.exceptions import DatasetNotFoundError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from fastdllm.evaluation.code_tasks import code_metric, extract_all
from fastdllm.evaluation.families import CODE_TASKS, Family, family_of

LOCAL_TASKS = Path("data/tiny/tasks")
LIKELIHOOD_TYPES = ("loglikelihood", "multiple_choice")
CODE_FILTER = [{"name": "extract_code", "filter": [{"function": "custom", "filter_fn": extract_all}]}]
FILTERED = ("mbpp_instruct", "mbpp_plus_instruct")  # whose own filter loses right answers, see extract_code
SENTENCES = "tokenizers/punkt_tab/english/"

Spec = str | dict[str, Any]
"""What lm-eval is asked for: a name, or a config around one."""


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

    @property
    def uses_chat(self) -> bool:
        """Whether it is asked with the chat template."""
        family = family_of(self.name)
        return family is None or not family.is_completion


def load_task(task: str, offline: str = "") -> LoadedTask:
    """Return an lm-eval task (or group) and its data.

    Args:
        offline: folder with data laid out by hub id; "": the hub.
    Raises:
        ValueError, FileNotFoundError: no such task or data, or one that would fail when it is scored.
    """
    manager, spec = find_task(task, offline)
    random.seed(0)  # the seeds under which lm-eval loads tasks: some shuffle their choices then
    np.random.seed(1234)
    with code_metric() if task in CODE_TASKS else contextlib.nullcontext():
        loaded = _load(manager, spec, task)
    tops = list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())  # the outermost group comes first
    for member in loaded["tasks"].values():
        if member.config.repeats > 1:
            raise ValueError(
                f"{member.task_name} asks for each problem {member.config.repeats} times, which is not counted here; "
                "choose its variant with one answer a problem."
            )
    return LoadedTask(name=task, manager=manager, members=loaded["tasks"], wanted=tops)


def _load(manager: TaskManager, spec: Spec, task: str) -> dict[str, Any]:
    try:
        return manager.load([spec])
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"the data of task {task} cannot be read ({error}); check the network, or give a folder with it, laid out "
            "by hub id: --offline DIR (docs/tasks.md)."
        ) from error


def find_task(task: str, offline: str = "") -> tuple[TaskManager, Spec]:
    """Return a manager and what to ask it for: the project's own task, lm-eval's, or lm-eval's with local data.

    Raises:
        ValueError: no such task, or one that cannot be run here. FileNotFoundError: its data is not below `offline`.
    """
    local = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=False) if LOCAL_TASKS.is_dir() else None
    own = local.all_tasks if local is not None else []
    if local is not None and task in own:
        return local, task
    family = family_of(task)
    stock = family.stock if family is not None and family.stock else task
    manager = _stock_tasks(family.folders if family is not None else ())
    if stock not in manager.all_tasks:
        manager = _stock_tasks()
    if stock not in manager.all_tasks:
        nearest = difflib.get_close_matches(task, [*own, *manager.all_tasks], n=1)
        listing = "`python -m fastdllm.evaluation.harness ls tasks` lists them."
        raise ValueError(f"unknown task {task!r}; {f'did you mean {nearest[0]}?' if nearest else listing}")
    leaves = leaf_tasks(manager, stock)
    _check_leaves(manager, task, leaves)
    if "ifeval" in leaves:
        need_sentences(offline)
    return manager, _changed(manager, task, stock, leaves, _changes(task, family), offline)


@functools.cache
def _stock_tasks(folders: tuple[str, ...] = ()) -> TaskManager:
    """Return lm-eval's tasks, or those of some of its folders: for all it reads 14,000 files, which takes 10 s."""
    places = [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in folders]
    return TaskManager(include_path=places, include_defaults=False) if folders else TaskManager()


def leaf_tasks(manager: TaskManager, item: Spec) -> list[str]:
    """Return the names of the single tasks in a task, group or tag of lm-eval's index."""
    if isinstance(item, dict):
        inner = item["task"] if "task" in item else item["group"]
    elif item in manager.all_tags:
        inner = sorted(manager.task_index[item].tags)
    elif item in manager.all_groups:
        inner = manager.task_index[item].cfg["task"]
    else:
        return [item]
    parts = [inner] if isinstance(inner, str) else inner
    return [leaf for part in parts for leaf in leaf_tasks(manager, part)]


def _check_leaves(manager: TaskManager, task: str, leaves: list[str]) -> None:
    """Raise ValueError for a task with members that cannot be measured together, or that run code elsewhere."""
    unsafe = [name for name in leaves if manager.task_index[name].cfg.get("unsafe_code")]
    if unsafe and task not in CODE_TASKS:
        raise ValueError(
            f"{task} runs programs that the model wrote ({', '.join(unsafe[:3])}), and those that run in the sandbox "
            f"here are {', '.join(CODE_TASKS)}."
        )
    metrics = {family.metric for name in leaves if (family := family_of(name)) is not None}
    if len(metrics) > 1:
        raise ValueError(
            f"{task} names tasks that are measured in different ways ({', '.join(sorted(metrics))}); choose one of "
            f"them: {', '.join(leaves)}."
        )


def _changes(task: str, family: Family | None) -> dict[str, Any]:
    """Return what our form of a stock task has in place of lm-eval's."""
    data = {"dataset_path": family.data} if family is not None and family.data else {}
    return data | ({"filter_list": CODE_FILTER} if task in FILTERED else {})


def _changed(
    manager: TaskManager, task: str, stock: str, leaves: list[str], changes: dict[str, Any], offline: str
) -> Spec:
    """Return what to ask lm-eval for: the stock task, or a group of its single tasks with some keys replaced.

    A group within that group would hand the outer one's list of tasks down to its members as their name.
    """
    folders: dict[str, Path] = {}
    if offline:
        folders = {leaf: _offline_folder(manager, leaf, changes, offline) for leaf in leaves}
        _check_configurations(manager, task, folders)
    elif not changes:
        return stock
    paths = {leaf: {"dataset_path": str(folder)} for leaf, folder in folders.items()}
    parts = [{"task": leaf, **changes, **paths.get(leaf, {})} for leaf in leaves]
    return {"group": f"{task}_offline" if offline else f"{task}_here", "task": parts}


def _offline_folder(manager: TaskManager, leaf: str, changes: dict[str, Any], offline: str) -> Path:
    """Return the folder below `offline` with the data of one task. Raises FileNotFoundError: it is not there."""
    data = changes.get("dataset_path") or manager.task_index[leaf].cfg.get("dataset_path")
    if not data:
        raise ValueError(f"offline: lm-eval does not say which data {leaf} reads; run it without --offline.")
    folder = Path(offline, data).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"offline: task {leaf} needs the folder {folder}, which is not there; see --help.")
    return folder


def _check_configurations(manager: TaskManager, task: str, folders: dict[str, Path]) -> None:
    """Raise FileNotFoundError for parts of the data, such as subjects of mmlu, that the local files do not have."""
    there = {folder: get_dataset_config_names(str(folder)) for folder in set(folders.values())}
    wanted = {leaf: manager.task_index[leaf].cfg.get("dataset_name") for leaf in folders}
    missing = {wanted[leaf]: None for leaf, folder in folders.items() if wanted[leaf] not in (None, *there[folder])}
    if missing:
        folder = next(iter(folders.values()))
        raise FileNotFoundError(
            f"offline: task {task} reads {len(set(wanted.values()))} configurations of {folder}, which lacks "
            f"{', '.join(missing)}; add them, or choose a task that reads what is there."
        )


def need_sentences(offline: str = "") -> None:
    """Make sure of nltk's punkt_tab, without which ifeval fails when its answers, all generated, are scored.

    Raises:
        FileNotFoundError: it is not there and cannot be downloaded.
    """
    try:
        nltk.data.find(SENTENCES)
    except LookupError:
        if not offline and nltk.download("punkt_tab", quiet=True):
            return
        raise FileNotFoundError(
            "ifeval needs nltk's punkt_tab to score answers, and it is in no folder of nltk's; run `python -m "
            "nltk.downloader punkt_tab` where there is a network, or let NLTK_DATA name a folder that holds "
            f"{SENTENCES}."
        ) from None
