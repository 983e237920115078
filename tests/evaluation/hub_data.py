"""A few problems of our own in the layout in which the hub has a task's data."""

import csv
import json
from pathlib import Path

HUMANEVAL = [
    {
        "task_id": "ours/0",
        "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Return the sum. """\n',
        "canonical_solution": "    return sum(numbers)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
        "entry_point": "total",
    },
    {
        "task_id": "ours/1",
        "prompt": 'def turned(text: str) -> str:\n    """ Return the text from its end. """\n',
        "canonical_solution": "    return text[::-1]\n",
        "test": "def check(candidate):\n    assert candidate('abc') == 'cba'\n",
        "entry_point": "turned",
    },
]
MBPP = [
    {
        "task_id": 11,
        "text": "Write a function that doubles a number.",
        "code": "def double(x):\r\n  return 2 * x",
        "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert double(-1) == -2"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
]
SUBJECT = [{"question": f"What is {n} + {n}?", "choices": list("1248"), "answer": n, "subject": "s"} for n in range(4)]
GPQA = {"Question": "Which is even?", "Correct Answer": "two", "Incorrect Answer 1": "one"}
GPQA |= {"Incorrect Answer 2": "three", "Incorrect Answer 3": "five"}


def write(root: Path, dataset: str, files: dict[str, list[dict]], configurations: dict[str, dict[str, str]]) -> str:
    """Write a dataset below `root` and return `root`.

    Args:
        files: rows by path; configurations: path of each split, by name.
    """
    folder = root / dataset
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / path).open("w", newline="") as file:
            if path.endswith(".csv"):
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configurations.items()
    ]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")
    return str(root)


def write_code(root: Path) -> str:
    """Write HumanEval (and plus) and MBPP (and plus)."""
    for dataset in ("openai/openai_humaneval", "evalplus/humanevalplus"):
        write(root, dataset, {"test.jsonl": HUMANEVAL}, {"default": {"test": "test.jsonl"}})
    splits = {split: f"full/{split}.jsonl" for split in ("train", "test", "validation", "prompt")}
    write(root, "google-research-datasets/mbpp", dict.fromkeys(splits.values(), MBPP), {"full": splits})
    return write(root, "evalplus/mbppplus", {"test.jsonl": MBPP}, {"default": {"test": "test.jsonl"}})


def write_subjects(root: Path, *subjects: str) -> str:
    """Write subjects of MMLU."""
    files = {f"{subject}/{split}.jsonl": SUBJECT for subject in subjects for split in ("test", "validation", "dev")}
    splits = {s: {split: f"{s}/{split}.jsonl" for split in ("test", "validation", "dev")} for s in subjects}
    return write(root, "cais/mmlu", files, splits)


def write_gpqa(root: Path) -> str:
    """Write the main part of GPQA."""
    return write(root, "Idavidrein/gpqa", {"gpqa_main.csv": [GPQA] * 7}, {"gpqa_main": {"train": "gpqa_main.csv"}})
