"""Programs in processes forked from one that has imported what they need: they start in a second instead of ten."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

context = multiprocessing.get_context("forkserver")


def ensure_server() -> None:
    """Start the server of this test process, unless it runs: one for all tests, which has imported preload.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))  # it is not told of sys.path
        context.set_forkserver_preload(["preload"])
        forkserver.ensure_running()


def start(function: Callable, *arguments: Any, log: Path, **environment: str) -> multiprocessing.Process:
    """Call a function of a module in a process of its own, with this process's environment and `environment`.

    What it prints goes to the end of `log`. Its exit status is that of a program: an error is 1.
    """
    ensure_server()
    log.touch()
    process = context.Process(target=_call, args=(log, {**os.environ, **environment}, os.getcwd(), function, arguments))
    process.start()
    return process


def _call(log: Path, environment: dict[str, str], folder: str, function: Callable, arguments: tuple) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assert "preload" in sys.modules, "the server did not find preload.py, and says nothing of it"
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*arguments)
