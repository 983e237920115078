"""What the README shows works: its commands parse, its Python runs, its tree names what is there."""

import re
import shlex
from pathlib import Path

import pytest

from fastdllm.cli import parse
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python ")
]


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if re.match(r"python (train|evaluate)\.py", command)]
)
def test_a_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, program, *arguments = shlex.split(command)
    parse(TrainConfig if program == "train.py" else EvaluateConfig, arguments)


def test_the_python_example_answers_its_problem(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = [block for language, block in BLOCKS if language == "python"]
    exec(compile(example, "README.md", "exec"), {})
    whole, streamed = capsys.readouterr().out.split("\n#### ")[0], capsys.readouterr()
    assert "12 pens" in whole and not streamed.err


def test_every_module_is_in_the_tree():
    tree = README.split("## What is where")[1]
    for path in (ROOT / "fastdllm").rglob("*.py"):
        if not path.name.startswith("__"):
            assert re.search(rf"\b{path.stem}\b", tree), f"{path.name} is not in the README's tree"
    for path in [*ROOT.glob("*/"), *ROOT.glob("*.py")]:
        if not path.name.startswith((".", "_", "runs")) and not path.name.endswith(".egg-info"):
            assert path.name in tree, f"{path.name} is not in the README's tree"
    assert len(README.splitlines()) <= 150
