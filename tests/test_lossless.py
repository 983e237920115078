"""The benchmark of lossless drafting on the bundled model: rows, exactness and what is accepted."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from fastdllm.adapter import AdapterSettings, adapter_weights, add_adapter, save_adapter
from fastdllm.checkpoint import load_checkpoint
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine
from fastdllm.evaluation.harness import published_prompt

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data/tiny")


@pytest.fixture
def lossless(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("lossless")


@pytest.fixture
def adapter(tmp_path):
    model = load_checkpoint(TINY).model()
    add_adapter(model, AdapterSettings(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in adapter_weights(model).values():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    save_adapter(model, tmp_path / "drafts")
    return str(tmp_path / "drafts")


def make_config(lossless, adapter, tmp_path, **changes):
    options = dict(checkpoint=TINY, adapter=adapter, prompts=f"{TINY}/test.jsonl", count=3, exact_count=3)
    options |= dict(max_new_tokens=10, batch_sizes=[1, 2], draft_lengths=[3, 0], output=str(tmp_path / "rows"))
    return lossless.LosslessConfig(**options, **changes)


def test_rows_say_how_fast_and_whether_the_text_is_the_models_own(lossless, adapter, tmp_path, capsys):
    rows = lossless.measure(make_config(lossless, adapter, tmp_path, dtype="float32"))
    names = {path.stem for path in (tmp_path / "rows").iterdir()}
    policies = ("transformers", "ar", "verified-d3", "verified-dchosen")
    expected = {f"drafts-test-{policy}-b{size}" for policy in policies for size in (1, 2)}
    assert names == expected | {"drafts-test-acceptance-d3"}
    written = json.loads((tmp_path / "rows" / "drafts-test-verified-d3-b2.json").read_text())
    assert written in rows and written["equal"] == written["compared"] == 3 and written["differences"] == []
    speed = {(row["policy"], row["draft_length"], row["batch_size"]): row.get("tokens_per_second") for row in rows}
    own = speed["verified", 3, 2]
    assert written["speedup_over_own_ar"] == own / speed["ar", None, 2]
    assert written["speedup_over_transformers"] == own / speed["transformers", None, 2]
    rows_of_a_pass = 1 + 3 + 3 * 4
    assert written["rows_per_token"] == pytest.approx(rows_of_a_pass / written["tokens_per_forward"])
    ar = next(row for row in rows if row["policy"] == "ar")
    assert ar["tokens_per_forward"] == ar["rows_per_token"] == 1
    accepted = rows[-1]
    assert len(accepted["accepted_by_place"]) == 3 and len(accepted["accepted_counts"]) == 4
    said = capsys.readouterr().out
    assert "| verified, chosen drafts | 2 |" in said and "3 of 3" in said and said.count("| policy |") == 1


def test_a_difference_is_listed_with_the_margin_of_the_reference(lossless, adapter, tmp_path):
    bench = lossless.Lossless(make_config(lossless, adapter, tmp_path, dtype="float32"))
    reference = bench.reference
    wrong = [list(answer) for answer in reference]
    wrong[1][4] += 1
    wrong[2] = wrong[2][:-1]
    found = bench.compare(wrong)
    assert (found["compared"], found["equal"]) == (3, 1)
    token, length = found["differences"]
    assert (token["prompt"], token["place"], token["tokens"]) == (1, 4, [reference[1][4] + 1, reference[1][4]])
    ids = torch.tensor([bench.requests[1].prompt + reference[1][:4]])
    with torch.no_grad():
        best, second = load_checkpoint(TINY).qwen(ids).logits[0, -1].topk(2).values
    assert token["margin"] == pytest.approx(float(best - second), abs=1e-3)
    assert (length["prompt"], length["place"], length["tokens"][0]) == (2, len(reference[2]) - 1, None)


def test_batches_give_the_reference_in_its_order(lossless, adapter, tmp_path):
    alone = lossless.Lossless(make_config(lossless, adapter, tmp_path, dtype="float32", timed_count=1))
    config = make_config(lossless, adapter, tmp_path, dtype="float32", timed_count=1, exact_batch_size=2)
    shared = lossless.Lossless(config)
    assert shared.reference == alone.reference and len(shared.reference) == 3 and len(shared.timed[0]) == 1


def test_rows_are_there_when_a_later_cell_fails(lossless, adapter, tmp_path, monkeypatch):
    def fail(self, draft_length):
        raise RuntimeError("later")

    monkeypatch.setattr(lossless.Lossless, "acceptance_row", fail)
    with pytest.raises(RuntimeError, match="later"):
        lossless.measure(make_config(lossless, adapter, tmp_path, dtype="float32"))
    assert len(list((tmp_path / "rows").iterdir())) == 8


def test_what_is_noted_of_drafts_is_what_answers_count(lossless, adapter, tmp_path, monkeypatch):
    bench = lossless.Lossless(make_config(lossless, adapter, tmp_path, dtype="float32"))
    constant = torch.zeros(bench.adapted.qwen.config.vocab_size)
    constant[9] = 1.0
    monkeypatch.setattr(bench.adapted, "logits", lambda hidden: constant.expand(*hidden.shape[:-1], -1))
    engine = Engine(
        bench.adapted, bench.tokenizer, decode=DecodeConfig(policy="verified", draft_length=3), batch_size=2
    )
    engine.steps_class = lossless.NotedSteps
    done = list(engine.run(bench.requests))
    notes = engine.steps.notes
    assert notes["kept"].sum() == sum(one.accepted_drafts for one in done) > 12  # every draft is right
    assert notes["reached"].sum() == sum(one.checked_drafts for one in done)
    assert notes["counts"][:3].sum() == 0 and notes["counts"][3] == notes["kept"][2]


def test_prompts_are_asked_as_evaluation_asks(lossless, tmp_path):
    prompts = importlib.import_module("prompts")
    form, beginning = prompts.FORMS["question"]
    asked = form.format(question="How many?")
    assert asked == published_prompt("gsm8k", "Question: How many?\nAnswer:") and not beginning
    tokenizer, file = load_checkpoint(TINY).tokenizer, tmp_path / "humaneval.jsonl"
    file.write_text(json.dumps({"prompt": "def f():\n", "entry_point": "f"}) + "\n")
    (request,) = prompts.read_requests(str(file), 5, 8, tokenizer)
    text = tokenizer.decode(request.prompt)
    assert text.endswith("completed function:\n```python\ndef f():\n\n") or text.endswith("```python\ndef f():")
    file.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="has a line without any of question, entry_point, prompt: .'text'."):
        prompts.read_requests(str(file), 5, 8, tokenizer)
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        lossless.LosslessConfig(checkpoint="a", adapter="b", prompts="c", count=0)
