"""What the README shows in Python answers, and its tree names what is there; its commands are in test_docs."""

import re

from pages import ROOT, blocks

README = (ROOT / "README.md").read_text()


def test_the_python_example_answers_its_problem(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = [block for language, block in blocks(README) if language == "python"]
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
