"""A tiny adapted checkpoint, a plain one, and a local task of four problems; nothing is downloaded."""

import json

import pytest
import torch
from conftest import make_qwen

from fastdllm.checkpoint import Adaptation, save_checkpoint

TASK = {
    "task": "toy_problems",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["zzz"], "do_sample": False, "max_gen_toks": 40},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        }
    ],
}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty working directory with the toy task where the project keeps its own tasks."""
    tasks = tmp_path / "data" / "tiny" / "tasks"
    tasks.mkdir(parents=True)
    problems = [{"question": f"{a} + {a}?", "answer": str(2 * a), "split": "ab"[a % 2]} for a in (2, 3, 14, 25)]
    (tasks.parent / "toy.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    data = {"dataset_kwargs": {"data_files": {"test": str(tasks.parent / "toy.jsonl")}}}
    (tasks / "toy_problems.yaml").write_text(json.dumps(TASK | data))
    letters = {"task": "toy_letters", "output_type": "multiple_choice", "doc_to_choice": ["A", "B"], "doc_to_target": 0}
    shared = {name: TASK[name] for name in ("dataset_path", "test_split", "doc_to_text")}
    (tasks / "toy_letters.yaml").write_text(json.dumps(shared | letters | data))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and 12 other programs
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of programs that the tests start
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))  # our own; it was read long ago
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _save(folder, tokenizer, adaptation):
    qwen = make_qwen()
    mask_token_id = tokenizer.convert_tokens_to_ids("|<MASK>|")
    save_checkpoint(folder, qwen.state_dict(), qwen.config, tokenizer, mask_token_id, adaptation, dtype=torch.float32)
    return str(folder)


@pytest.fixture
def adapted(project, byte_tokenizer):
    """An export of a run, with random weights."""
    adaptation = Adaptation(task="toy_problems", threshold=0.8, data_tokens=123)
    return _save(project / "runs" / "tried" / "export", byte_tokenizer, adaptation)


@pytest.fixture
def causal(project, byte_tokenizer):
    """An export whose context attends token by token, the newest one."""
    adaptation = Adaptation(task="toy_problems", context_attention="causal")
    return _save(project / "runs" / "causal" / "export", byte_tokenizer, adaptation)


@pytest.fixture
def plain(project, byte_tokenizer):
    """An autoregressive checkpoint with random weights."""
    return _save(project / "plain", byte_tokenizer, None)
