"""What tasks that run a model's programs need: permission, our metric under lm-eval's, the program in an answer."""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from fastdllm.evaluation.families import CODE_TASKS
from fastdllm.evaluation.sandbox import Permission, permission, permit_programs

METRICS = Path(__file__).with_name("metrics")
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n?", re.MULTILINE)


def permit_code(
    tasks: Iterable[str], *, allow_code_execution: bool, allow_network: bool
) -> AbstractContextManager[Permission | None]:
    """Return a context in which the programs of these tasks may run; it does nothing if none of them runs code.

    Raises:
        ValueError: a task runs code and that was not allowed, or the network alone was.
        SandboxError (on entry): the system cannot isolate it.
    """
    if allow_network and not allow_code_execution:
        raise ValueError("allow_network is for programs, which need --allow_code_execution to run; give both or none.")
    code = [task for task in tasks if task in CODE_TASKS]
    if code and not allow_code_execution:
        raise ValueError(
            f"{', '.join(code)} runs programs that the model wrote; allow it with --allow_code_execution (each runs "
            "with limits and without a network; fastdllm/evaluation/sandbox.py says what that keeps out)."
        )
    return permit_programs(allow_network=allow_network) if code else contextlib.nullcontext()


@contextmanager
def code_metric() -> Iterator[None]:
    """Let lm-eval's code tasks find our metric code_eval while the block loads them.

    They load it by name with Hugging Face's evaluate, which looks below the working directory first and otherwise
    downloads another. That library has the name of the script at this repository's root, which hides it.

    Raises:
        PermissionError: outside of `permit_code`.
    """
    permission()  # else it would only be missed when answers are scored
    _import_library("evaluate")
    with contextlib.chdir(METRICS):
        yield


def _import_library(name: str) -> None:
    """Import the installed package `name`, also where a file of that name comes first on the path."""
    folder = str(metadata.distribution(name).locate_file(""))
    module = sys.modules.get(name)
    if module is not None and Path(module.__file__).is_relative_to(folder):
        return
    spec = PathFinder.find_spec(name, [folder])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def extract_code(answer: str) -> str:
    """Return the program in an answer that goes on behind an opened code fence.

    It reaches to the first fence. If that fence names a language, or nothing stands before it, it opens a block of the
    answer's own, whose text is the program then. lm-eval's own filter for mbpp takes the first word of an answer, such
    as def, for the fence's language, and gives nothing where the answer was cut before the closing fence.
    """
    first = FENCE.search(answer)
    if first is None:
        return answer
    before, after = answer[: first.start()], answer[first.end() :]
    if before.strip() and not first[1]:
        return before
    last = FENCE.search(after)
    return after if last is None else after[: last.start()]


def extract_all(responses: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Return the programs of all answers, in the form in which lm-eval calls a filter."""
    return [[extract_code(answer) for answer in answers] for answers in responses]
