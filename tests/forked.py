"""Programs in processes forked from one that has imported what they need: they start in a second instead of ten."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

context = multiprocessing.get_context("forkserver")  # one server for a whole test process, whoever asks first
PRELOAD = ["fastdllm.training.run", "fastdllm.evaluation.run", "deepspeed", "tensorboard", "forked"]
context.set_forkserver_preload(PRELOAD)


def start(function: Callable, *arguments: Any, log: Path, **environment: str) -> multiprocessing.Process:
    """Call a function of a module in a process of its own, with this process's environment and `environment`.

    What it prints goes to the end of `log`. Its exit status is that of a program: an error is 1.
    """
    log.touch()
    process = context.Process(target=_call, args=(log, {**os.environ, **environment}, os.getcwd(), function, arguments))
    process.start()
    return process


def _call(log: Path, environment: dict[str, str], folder: str, function: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    function(*arguments)
