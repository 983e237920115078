"""`--trace N`: which files appear, what they say of the cell they belong to, and what is refused."""

import json

import pytest

from fastdllm.decoding.trace import read_trace
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.run import evaluate


def traces_of(folder):
    return sorted((folder / "traces").glob("*.json"))


def test_the_first_problems_of_a_cell_are_traced_with_the_answers_that_it_scored(adapted, project, capsys):
    folder = project / "runs" / "tried"
    (row,) = evaluate(EvaluateConfig(max_new_tokens=20, trace=2))
    files = traces_of(folder)
    assert [file.name for file in files] == [f"{row['cell']}.{number}.json" for number in (0, 1)]
    samples = [json.loads(line) for line in (folder / "samples" / f"{row['cell']}.samples.jsonl").open()]
    for number, trace in enumerate(map(read_trace, files)):
        assert (trace.cell, trace.label, trace.mode, trace.problem) == (row["cell"], "tried", "diffusion", number)
        assert (trace.prompt, trace.text) == (samples[number]["prompt"], samples[number]["response"])
        assert (trace.target, trace.correct) == (samples[number]["target"], samples[number]["correct"])
        assert trace.settings["threshold"] == 0.8 and trace.identity["checkpoint_hash"] == row["checkpoint_hash"]
        places = {token.place for step in trace.steps for token in step.tokens}
        answer = range(trace.num_prompt_tokens, trace.num_prompt_tokens + trace.num_tokens)
        assert places.issuperset(answer) and len(answer) > 0


def test_a_cell_that_has_a_row_is_traced_once_and_again_if_forced(adapted, project, capsys):
    folder, options = project / "runs" / "tried", dict(max_new_tokens=9, limit=2)
    evaluate(EvaluateConfig(**options))
    assert not traces_of(folder)
    evaluate(EvaluateConfig(**options, trace=1))
    (file,) = traces_of(folder)
    written = file.stat().st_mtime_ns
    evaluate(EvaluateConfig(**options, trace=1))
    assert file.stat().st_mtime_ns == written
    file.write_text(file.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(ValueError, match="must have version 1, got 0"):
        evaluate(EvaluateConfig(**options, trace=1))
    evaluate(EvaluateConfig(**options, trace=1, force="all"))
    assert read_trace(file).num_tokens == 9
    assert capsys.readouterr().out.count("wrote 1 traces") == 2


def test_an_autoregressive_model_is_traced_token_by_token(plain, project):
    evaluate(EvaluateConfig(checkpoint=plain, task="toy_problems", max_new_tokens=6, limit=1, trace=1))
    trace = read_trace(*traces_of(project / "runs" / "plain"))
    assert trace.mode == "ar" and trace.block_size == 1
    assert [step.kind for step in trace.steps if step.tokens] == ["token"] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": True}, "trace 2 needs a run of engine fastdllm"),
        ({"dry_run": True}, "trace 2 needs a run of engine fastdllm"),
        ({"engine": "transformers"}, "trace 2 needs a run of engine fastdllm"),
        ({"limit": 1}, r"trace must be at most limit \(1\), got 2"),
        ({"trace": -1}, "trace must be 0 or more, got -1"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{"trace": 2, **options})


def test_a_task_that_decodes_nothing_has_no_trace(adapted):
    with pytest.raises(ValueError, match="trace 2"):
        evaluate(EvaluateConfig(task="toy_letters", trace=2))
