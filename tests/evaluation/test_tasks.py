"""Tasks are found, their data is found, and what would fail later is refused while they are loaded."""

import json
import re
from pathlib import Path

import nltk
import pytest

from fastdllm.evaluation import tasks
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.families import FAMILIES, family_of
from fastdllm.evaluation.run import evaluate
from fastdllm.evaluation.tasks import _stock_tasks, find_task, leaf_tasks, load_task

from .conftest import TASK
from .hub_data import write, write_gpqa, write_subjects

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


def stock_names(name):
    family = FAMILIES[name]
    return [
        task for task in _stock_tasks(family.folders).all_tasks if family_of(task) is family or task == family.stock
    ]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.folders])
def test_every_family_is_one_of_lm_evals(name):
    assert stock_names(name)


def test_the_longest_name_decides_and_code_tasks_have_whole_names():
    assert family_of("gpqa_main_zeroshot").metric == "acc"
    assert family_of("gpqa_main_cot_zeroshot").metric == "exact_match"
    assert family_of("mmlu_generative").filter_name == "get_response"
    assert family_of("humaneval_64") is None and family_of("unheard_of") is None


def test_the_page_on_tasks_says_what_the_table_says():
    lines = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in DOCS.read_text().splitlines() if line[:3] == "| `"]
    told = {name: line[1:4] for line in lines for name in re.findall(r"`([^`]+)`", line[0])}
    for name, family in FAMILIES.items():
        form = "completion" if family.is_completion else "chat"
        runs_code = "yes" if family.runs_code else "no"
        assert told.pop(name) == [f"`{family.metric}`, `{family.filter_name}`", form, runs_code], name
    assert not told


def test_data_that_is_not_there_names_the_folder(tmp_path):
    for task, folder in (("gsm8k", "openai/gsm8k"), ("humaneval_plus_instruct", "evalplus/humanevalplus")):
        with pytest.raises(FileNotFoundError, match=f"offline: task .* needs the folder {tmp_path}/{folder}"):
            find_task(task, offline=str(tmp_path))


def test_an_unknown_task_is_answered_with_the_nearest(tmp_path, monkeypatch):
    few = _stock_tasks(("gsm8k",))  # all of lm-eval's take 10 s
    monkeypatch.setattr(tasks, "_stock_tasks", lambda folders=(): few)
    with pytest.raises(ValueError, match="unknown task 'gsm9k'; did you mean gsm8k"):
        find_task("gsm9k", offline=str(tmp_path))


def test_mmlu_names_the_subjects_that_local_files_lack(tmp_path):
    data = write_subjects(tmp_path, "anatomy", "virology")
    for task in ("mmlu", "mmlu_generative"):
        with pytest.raises(FileNotFoundError, match=f"task {task} reads 57 configurations of {data}") as error:
            find_task(task, offline=data)
        assert "abstract_algebra" in str(error.value) and "virology" not in str(error.value)


def test_mmlu_with_all_subjects_reads_each_from_local_files(tmp_path):
    manager = _stock_tasks(("mmlu",))
    subjects = {manager.task_index[leaf].cfg["dataset_name"] for leaf in leaf_tasks(manager, "mmlu")}
    data = write_subjects(tmp_path, *subjects)
    assert len(subjects) == 57
    _, spec = find_task("mmlu", offline=data)
    assert {part["dataset_path"] for part in spec["task"]} == {f"{data}/cais/mmlu"}
    assert {part["task"].removeprefix("mmlu_") for part in spec["task"]} == subjects


def test_a_group_is_loaded_from_local_files_with_every_member(tmp_path):
    splits = ("train", "test")
    problem = {"problem": "1 + 1?", "solution": "It is $\\boxed{2}$.", "type": "Algebra", "level": "Level 1"}
    manager = _stock_tasks(FAMILIES["minerva_math"].folders)
    names = {leaf: manager.task_index[leaf].cfg["dataset_name"] for leaf in leaf_tasks(manager, "minerva_math")}
    files = {f"{name}/{split}.jsonl": [problem] for name in names.values() for split in splits}
    configurations = {name: {split: f"{name}/{split}.jsonl" for split in splits} for name in names.values()}
    loaded = load_task("minerva_math", write(tmp_path, "EleutherAI/hendrycks_math", files, configurations))
    assert loaded.members.keys() == names.keys() and len(names) == 7
    assert all(len(member.test_docs()) == 1 for member in loaded.members.values())


def test_a_subject_of_mmlu_runs_from_local_files_by_likelihood_and_by_generation(adapted, plain, tmp_path):
    data = write_subjects(tmp_path, "anatomy")
    for checkpoint, likelihood in ((adapted, "first token, published form"), (plain, "exact")):
        (row,) = evaluate(EvaluateConfig(task="mmlu_anatomy", offline=data, checkpoint=checkpoint))
        assert (row["metric"], row["num_samples"], row["likelihood"]) == ("acc,none", 4, likelihood)
    config = EvaluateConfig(task="mmlu_anatomy_generative", offline=data, max_new_tokens=4, limit=2)
    (row,) = evaluate(config)
    assert (row["metric"], row["num_samples"]) == ("exact_match,get_response", 2) and row["counted_tokens"]
    with pytest.raises(ValueError, match="cannot exercise reuse_k 2"):
        evaluate(EvaluateConfig(task="mmlu_anatomy", offline=data, reuse_k=2))


def test_gpqa_runs_from_local_files_where_the_likelihood_can_tell_its_answers_apart(adapted, plain, tmp_path):
    data = write_gpqa(tmp_path)
    for task in ("gpqa_main_zeroshot", "gpqa_main_n_shot"):
        (row,) = evaluate(EvaluateConfig(task=task, offline=data, checkpoint=plain))
        assert (row["metric"], row["num_samples"], row["likelihood"]) == ("acc,none", 7, "exact")
    # the tests' tokens are bytes, so all four answers, (A) to (D), begin with the same one
    with pytest.raises(ValueError, match=r"first token.*'\(A\)' and '\(B\)' begin with the same one; use mode ar"):
        evaluate(EvaluateConfig(task="gpqa_main_zeroshot", offline=data, checkpoint=adapted))
    (row,) = evaluate(EvaluateConfig(task="gpqa_main_cot_zeroshot", offline=data, max_new_tokens=4, limit=2))
    assert row["metric"] == "exact_match,flexible-extract" and row["num_samples"] == 2


def test_a_tag_of_tasks_that_are_measured_differently_asks_for_one():
    with pytest.raises(ValueError, match="gpqa names tasks.*acc, exact_match.*choose one.*gpqa_main_n_shot"):
        find_task("gpqa")


def test_a_task_that_asks_several_times_is_refused_when_it_is_loaded(project):
    tasks = project / "data" / "tiny" / "tasks"
    files = {"dataset_kwargs": {"data_files": {"test": str(tasks.parent / "toy.jsonl")}}}
    (tasks / "toy_repeats.yaml").write_text(json.dumps({**TASK, **files, "task": "toy_repeats", "repeats": 3}))
    with pytest.raises(ValueError, match="toy_repeats asks for each problem 3 times"):
        load_task("toy_repeats")


def test_ifeval_is_refused_without_its_sentence_splitter_before_it_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="ifeval needs nltk's punkt_tab.*NLTK_DATA"):
        load_task("ifeval", offline=str(tmp_path))
    (tmp_path / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="google/IFEval"):
        load_task("ifeval", offline=str(tmp_path))


def test_a_task_whose_data_the_network_does_not_give_names_the_way_out(monkeypatch):
    def unreachable(*arguments):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", unreachable)
    with pytest.raises(FileNotFoundError, match="task gsm8k cannot be read .*Couldn't reach.*--offline DIR"):
        load_task("gsm8k")
