"""lm-eval's own command line with three options of ours: `python -m fastdllm.evaluation.harness run --offline DIR ...`.

A task whose data is local, or whose form here is not lm-eval's, is handed over as a file with a group around the stock
task, so that both commands evaluate the same.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType

import yaml
from lm_eval.__main__ import cli_evaluate

from fastdllm.evaluation.code_tasks import permit_code
from fastdllm.evaluation.families import CODE_TASKS, family_of
from fastdllm.evaluation.tasks import find_task, load_task, need_sentences

CONFIRM = "--confirm_run_unsafe_code"
OTHER_COMMANDS = ("ls", "validate")


class SpecDumper(yaml.SafeDumper):
    """Writes a function as the name by which lm-eval imports it."""


SpecDumper.add_representer(
    FunctionType, lambda dumper, value: dumper.represent_scalar("!function", f"{value.__module__}.{value.__name__}")
)


def main(argv: list[str] | None = None) -> None:
    """Run lm-eval's command line; a task that cannot be run is one line on standard error and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with ExitStack() as stack:
        if {"-h", "--help"} & set(arguments):
            print(_parser().format_help())
        elif arguments and arguments[0] not in OTHER_COMMANDS:
            try:
                arguments = translate(arguments, stack)
            except (ValueError, FileNotFoundError, RuntimeError) as error:
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(2) from None
        sys.argv[1:] = arguments  # lm-eval reads no other
        cli_evaluate()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run", usage="run [our options] [lm-eval's options]", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--offline", default="", metavar="DIR", help="folder with data laid out by hub id")
    parser.add_argument("--allow_code_execution", action="store_true", help="run programs that the model wrote")
    parser.add_argument("--allow_network", action="store_true", help="also where the system cannot isolate them")
    parser.add_argument("--tasks", "-t", nargs="+", default=[], help="as lm-eval's")
    parser.add_argument("--config", "-C", default="", help="as lm-eval's")
    return parser


def translate(arguments: list[str], stack: ExitStack) -> list[str]:
    """Return the arguments for lm-eval.

    Args:
        stack: what it holds until lm-eval has run: permission for programs, the files of tasks.
    Raises:
        ValueError, FileNotFoundError, SandboxError: a task that cannot be run, with the way out.
    """
    given, others = _parser().parse_known_args(arguments)
    file = yaml.safe_load(Path(given.config).read_text()) if given.config else {}
    if "confirm_run_unsafe_code" in file or any(part.startswith("--confirm") for part in others):
        raise ValueError(
            f"{CONFIRM} runs what a model wrote without walls around it; use --allow_code_execution, which has them."
        )
    named = given.tasks or file.get("tasks") or []
    parts = [named] if isinstance(named, str) else named
    tasks = [task for part in parts for task in part.split(",") if task]
    permission = {name: getattr(given, name) for name in ("allow_code_execution", "allow_network")}
    stack.enter_context(permit_code(tasks, **permission))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tasks-")))
    prepared = [_prepare(task, given.offline, folder) for task in tasks]
    others += ["--config", given.config] if given.config else []
    others += [CONFIRM] if any(task in CODE_TASKS for task in tasks) else []
    return others + (["--tasks", *prepared] if prepared else [])


def _prepare(task: str, offline: str, folder: Path) -> str:
    """Return what lm-eval's command line is to be asked for: the task's name, or the file of its form here."""
    family = family_of(task)
    if task.endswith(".yaml") or not (offline or task in CODE_TASKS or (family is not None and family.stock)):
        if task == "ifeval":
            need_sentences()
        return task
    _, spec = find_task(task, offline)
    if task in CODE_TASKS:
        load_task(task, offline)  # imports the task's functions, with our metric in them, for the whole process
    if isinstance(spec, str):
        return spec
    file = folder / f"{task}.yaml"
    file.write_text(yaml.dump(spec, Dumper=SpecDumper))
    return str(file)
