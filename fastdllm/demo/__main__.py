"""python -m fastdllm.demo COMMAND: the demo, and a look at what it did."""

import sys

from fastdllm.cli import run_command


def run_demo(arguments: list[str]) -> None:
    """Adapt the bundled model, evaluate it and draw what came out: make demo."""
    from fastdllm.cli import run
    from fastdllm.demo.run import DemoConfig, run_demo

    run(DemoConfig, run_demo, arguments)


def view(arguments: list[str]) -> None:
    """Write a page that plays the traces of a run."""
    from fastdllm.demo.view import main

    main(arguments)


def chat(arguments: list[str]) -> None:
    """Talk to a model, in the terminal or with --web in the browser."""
    from fastdllm.demo.chat import main

    main(arguments)


if __name__ == "__main__":
    run_command("fastdllm.demo", {"run": run_demo, "view": view, "chat": chat}, sys.argv[1:])
