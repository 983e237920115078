"""HumanEval and MBPP with answers of known worth, through lm-eval's own tasks, filters and scoring and our sandbox."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from fastdllm.checkpoint import load_checkpoint
from fastdllm.evaluation import run, tasks
from fastdllm.evaluation.code_tasks import extract_code, permit_code
from fastdllm.evaluation.command import translate
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.families import CODE_TASKS
from fastdllm.evaluation.harness import FastDLLMv2, run_task
from fastdllm.evaluation.run import evaluate
from fastdllm.evaluation.sandbox import SandboxError, run_program
from fastdllm.evaluation.tasks import _stock_tasks, load_task

from .hub_data import write_code


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    try:
        run_program("pass", is_isolated=True)
    except SandboxError as error:
        pytest.skip(f"programs cannot be isolated here: {error}")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


class Knowing(FastDLLMv2):
    """Gives the answers that it is told; keeps what it was asked."""

    def generate_until(self, requests, disable_tqdm=False):
        self.asked = [request.args for request in requests]
        self.requests = [self._request(number, request) for number, request in enumerate(requests)]
        return [self.answer(request.doc) for request in requests]


def measured(checkpoint, task, data, answer):
    """Return whether each problem was solved, the model, and the metric."""
    lm = Knowing(checkpoint=load_checkpoint(checkpoint), device="cpu")
    lm.answer = answer
    with permit_code([task], allow_code_execution=True, allow_network=False):
        result = run_task(lm, load_task(task, data))
    return [problem["correct"] for problem in result.problems], lm, result.metric


ANSWERS = {
    "humaneval": lambda doc: doc["canonical_solution"],
    "humaneval_plus": lambda doc: doc["canonical_solution"],
    "humaneval_instruct": lambda doc: doc["canonical_solution"] + "```\nThis adds them up.",
    "humaneval_plus_instruct": lambda doc: doc["canonical_solution"],
    "mbpp": lambda doc: doc["code"] + "\n",
    "mbpp_plus": lambda doc: doc["code"],
    "mbpp_instruct": lambda doc: doc["code"] + "\n```\nThis doubles it.",
    "mbpp_plus_instruct": lambda doc: "```python\n" + doc["code"] + "\n```",
}


SHOTS = {"mbpp": 3, "mbpp_plus": 3, "mbpp_instruct": 3}


@pytest.mark.parametrize("task", CODE_TASKS)
def test_right_programs_pass_empty_ones_fail_and_both_modes_read_the_same(task, adapted, plain, tmp_path):
    data = write_code(tmp_path)
    correct, diffusion, metric = measured(adapted, task, data, ANSWERS[task])
    assert correct == [1.0] * len(correct) and metric.startswith("pass")
    wrong, ar, _ = measured(plain, task, data, lambda doc: "    pass\n")
    assert not any(wrong)
    assert (diffusion.mode, ar.mode) == ("diffusion", "ar")
    assert diffusion.requests == ar.requests and diffusion.asked == ar.asked
    prompt, options = diffusion.asked[0]
    assert ("<|im_start|>" in prompt) == ("```python" in prompt) == task.endswith("_instruct")
    assert diffusion.requests[0].stop_strings == tuple(options["until"])
    if task.startswith("humaneval"):
        assert prompt.endswith('""" Return the sum. """\n' + "\n" * task.endswith("_instruct"))
        assert options["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"] and options["max_gen_toks"] == 1024
    else:
        assert len(re.findall("Your code should", prompt)) == 1 + SHOTS.get(task, 0)
        assert prompt.rstrip("\n").endswith("```python" if task.endswith("_instruct") else "[BEGIN]")


def test_a_program_that_leaves_before_its_tests_does_not_pass(adapted, tmp_path):
    data = write_code(tmp_path)
    for way_out in ("import os; os._exit(0)", "raise SystemExit(0)"):
        assert not any(measured(adapted, "mbpp", data, lambda doc, end=way_out: f"{doc['code']}\n{end}\n")[0])


@pytest.mark.parametrize(
    "answer, program",
    [
        ("def f():\n    return 1\n```\nIt returns 1.", "def f():\n    return 1\n"),
        ("def f():\n    return 1\n```\nOr:\n```python\ndef g(): pass\n```", "def f():\n    return 1\n"),
        ("\ndef f(): pass\n```", "\ndef f(): pass\n"),
        ("def f(): pass", "def f(): pass"),
        ("```python\ndef f(): pass\n```\nGood.", "def f(): pass\n"),
        ("\n```\ndef f(): pass\n```", "def f(): pass\n"),
        ("Here it is:\n```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```py\ndef f(): pass", "def f(): pass"),
        ("x = '```'\nprint(x)\n```", "x = '```'\nprint(x)\n"),
        ("", ""),
    ],
)
def test_the_program_is_found_in_an_answer(answer, program):
    assert extract_code(answer) == program


def test_without_permission_nothing_is_loaded_or_generated(adapted, project, monkeypatch):
    for name in ("load_task", "measure"):
        monkeypatch.setattr(run, name, None)
    with pytest.raises(ValueError, match="humaneval_instruct runs programs.*--allow_code_execution"):
        evaluate(EvaluateConfig(task="humaneval_instruct"))
    with pytest.raises(ValueError, match="allow_network.*--allow_code_execution"):
        evaluate(EvaluateConfig(task="toy_problems", allow_network=True))
    assert evaluate(EvaluateConfig(task="humaneval", dry_run=True)) == []


def test_a_task_cannot_be_loaded_past_the_permission(tmp_path):
    with pytest.raises(PermissionError, match="--allow_code_execution"):
        load_task("humaneval", write_code(tmp_path))


def test_evaluate_scores_programs_and_writes_their_row(adapted, tmp_path):
    config = EvaluateConfig(
        task="mbpp_instruct", offline=write_code(tmp_path), max_new_tokens=8, allow_code_execution=True
    )
    (row,) = evaluate(config)
    assert (row["metric"], row["num_samples"], row["accuracy"]) == ("pass_at_1,extract_code", 1, 0.0)


def test_tasks_that_run_code_elsewhere_are_refused(tmp_path, monkeypatch):
    few = _stock_tasks(("humaneval",))  # all of lm-eval's take 10 s
    monkeypatch.setattr(tasks, "_stock_tasks", lambda folders=(): few)
    with pytest.raises(ValueError, match="humaneval_64_instruct runs programs.*in the sandbox here are humaneval,"):
        load_task("humaneval_64_instruct", write_code(tmp_path))


def test_the_command_line_hands_lm_eval_our_form_of_a_task(tmp_path):
    data = write_code(tmp_path)
    with ExitStack() as stack:
        arguments = ["run", "--model", "m", "--tasks", "toy_problems", "mbpp_instruct", "--offline", data]
        theirs = translate([*arguments, "--allow_code_execution", "--limit", "2"], stack)
        assert theirs[:5] == ["run", "--model", "m", "--limit", "2"]
        assert theirs[5:8] == ["--confirm_run_unsafe_code", "--tasks", "toy_problems"]
        text = Path(theirs[8]).read_text()
        assert "!function 'fastdllm.evaluation.code_tasks.extract_all'" in text
        assert f"dataset_path: {data}/google-research-datasets/mbpp" in text
    assert not Path(theirs[8]).exists()


def test_the_command_line_refuses_programs_without_walls(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.dump({"tasks": ["humaneval"]}))
    for arguments, message in (
        (["run", "--tasks", "humaneval,gsm8k"], "humaneval runs programs"),
        (["run", "--config", str(file)], "humaneval runs programs"),
        (["run", "-t", "gsm8k", "--confirm_run_unsafe_code"], "without walls.*--allow_code_execution"),
        (["run", "-t", "gsm8k", "--allow_network"], "needs? --allow_code_execution"),
    ):
        with pytest.raises(ValueError, match=message), ExitStack() as stack:
            translate(arguments, stack)
