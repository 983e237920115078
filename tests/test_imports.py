"""The two rules on imports: each library has its doors, and modules import only from their left."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastdllm

PACKAGE = Path(__file__).parent.parent / "fastdllm"
ORDER = (
    ("cli", "runtime", "masks", "config_json", "gguf"),
    ("objective", "model"),
    ("draft",),
    ("adapter",),
    ("checkpoint",),
    ("data", "decoding"),
    ("training", "evaluation", "serving"),
    ("demo", "distill"),
    ("__init__", "__main__"),
)
DOORS = {
    "lightning": ("training/", "data/datamodule.py"),
    "deepspeed": ("training/strategies.py",),
    "peft": ("training/lora.py", "adapter.py"),
    "lm_eval": ("evaluation/harness.py", "evaluation/tasks.py", "evaluation/command.py"),
    # decoding, serving, demo: the tokenizer's type alone
    "transformers": ("model.py", "checkpoint.py", "data/", "decoding/", "serving/", "demo/conversation.py"),
    "tokenizers": ("checkpoint.py",),
    "datasets": ("data/", "evaluation/tasks.py", "evaluation/metrics/"),
    "evaluate": ("evaluation/metrics/",),
    "nltk": ("evaluation/tasks.py",),
    "jsonargparse": ("cli.py",),
    "matplotlib": ("evaluation/plots.py", "training/unmasking.py"),
    "starlette": ("serving/", "demo/web.py"),
    "uvicorn": ("serving/",),
    "pydantic": ("serving/", "demo/web.py"),
    "pydantic_core": ("serving/",),
    "rich": ("demo/", "evaluation/results.py"),
    "gguf": ("gguf.py",),
    "triton": ("decoding/kernels.py", "decoding/products.py"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    """Return the dotted names that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "fastdllm"]
    return names


def level_of(module):
    return next(level for level, names in enumerate(ORDER) if module in names)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_library_is_imported_at_its_doors_only(path):
    place = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or place.startswith(doors), f"{place} imports {name}, whose doors are {doors}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_modules_import_from_their_left_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "fastdllm" and len(parts) > 1:
            other = parts[1]
            assert other == own or level_of(other) <= level_of(own), f"{path} imports {name} from its right"
            assert (own, other) not in {("evaluation", "training"), ("training", "evaluation")}


def test_options_load_no_torch_and_decoding_neither_lightning_nor_lm_eval():
    heavy = ("lightning", "lm_eval", "datasets")
    code = "import sys, fastdllm.cli; print('torch' in sys.modules); fastdllm.Engine; print(sys.modules.keys() & "
    command = [sys.executable, "-c", f"{code}{set(heavy)})"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == ["False", "set()"]


def test_the_public_names_are_those_that_are_found():
    assert all(getattr(fastdllm, name).__name__ == name for name in fastdllm.__all__)
    assert sorted(fastdllm.__all__) == sorted(fastdllm._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'Engin'; it has Completion, "):
        _ = fastdllm.Engin
