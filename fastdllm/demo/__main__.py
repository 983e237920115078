"""python -m fastdllm.demo COMMAND: the demo, and a look at what it did."""

import sys

from fastdllm.cli import run_command
from fastdllm.demo import COMMANDS


def run_demo(arguments: list[str]) -> None:
    """Adapt the bundled model, evaluate it and draw what came out: make demo."""
    from fastdllm.cli import run
    from fastdllm.demo.run import DemoConfig, run_demo

    run(DemoConfig, run_demo, arguments)


if __name__ == "__main__":
    run_command("fastdllm.demo", {"run": run_demo, **COMMANDS}, sys.argv[1:])
