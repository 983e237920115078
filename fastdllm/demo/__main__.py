"""python -m fastdllm.demo COMMAND: the demo, and a look at what it did."""

import sys

from fastdllm.cli import run_command


def run_demo(arguments: list[str]) -> None:
    from fastdllm.cli import run
    from fastdllm.demo.run import DemoConfig, run_demo

    run(DemoConfig, run_demo, arguments)


def view(arguments: list[str]) -> None:
    from fastdllm.demo.view import main

    main(arguments)


def chat(arguments: list[str]) -> None:
    from fastdllm.demo.chat import main

    main(arguments)


if __name__ == "__main__":
    run_command("fastdllm.demo", {"run": run_demo, "view": view, "chat": chat}, sys.argv[1:])
