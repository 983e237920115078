"""A gated adapter in evaluation: it drafts, answers are the checkpoint's own, and what cannot use it refuses it."""

import json

import pytest
import torch
from conftest import make_qwen

import fastdllm
from fastdllm.adapter import AdapterSettings, adapter_weights, add_adapter, save_adapter
from fastdllm.checkpoint import load_checkpoint
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.evaluation.config import AxesConfig, EvaluateConfig
from fastdllm.evaluation.harness import FastDLLMv2
from fastdllm.evaluation.run import evaluate, measure
from fastdllm.evaluation.settings import make_plans

VERIFIED = DecodeConfig(policy="verified", draft_length=4)


@pytest.fixture
def drafter(plain, project):
    """The folder of an adapter, with random updates, of the plain checkpoint."""
    model = load_checkpoint(plain).model()
    add_adapter(model, AdapterSettings(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in adapter_weights(model).values():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    save_adapter(model, project / "runs" / "drafts" / "export", base="plain")
    return str(project / "runs" / "drafts" / "export")


def config(plain, drafter, **changes):
    options = dict(
        checkpoint=plain, adapter=drafter, task="toy_problems", device="cpu", max_new_tokens=16, batch_size=2
    )
    return EvaluateConfig(**{**options, **changes})


def test_answers_with_an_adapter_are_those_of_mode_ar_problem_by_problem(plain, drafter, project, capsys):
    (ours,) = evaluate(config(plain, drafter, decode=VERIFIED))
    assert "verified, 4 drafts, adapter drafts" in capsys.readouterr().out
    (theirs,) = evaluate(config(plain, "", mode="ar"))
    (adapted,) = evaluate(config(plain, drafter, mode="ar"))
    rows = (ours, theirs, adapted)
    responses = [
        [
            json.loads(line)["response"]
            for line in (project / "runs/plain/samples" / f"{row['cell']}.samples.jsonl").open()
        ]
        for row in rows
    ]
    assert responses[0] == responses[1] == responses[2] and len(responses[0]) == 4
    assert [row["config"]["adapter"] for row in rows] == ["drafts", None, "drafts"]
    assert "-adapter=drafts-" in ours["cell"] and "adapter" not in theirs["cell"]
    assert ours["checkpoint_hash"] == adapted["checkpoint_hash"] != theirs["checkpoint_hash"]
    assert str(project) not in json.dumps(ours)  # no path of this machine


def test_a_row_is_stale_when_the_adapter_is_another_one(plain, drafter, capsys):
    evaluate(config(plain, drafter, decode=VERIFIED, limit=1))
    evaluate(config(plain, drafter, decode=VERIFIED, limit=1, status=True))
    assert "1 of 1 measurements done" in capsys.readouterr().out
    model = load_checkpoint(plain, adapter=drafter).model()
    adapter_weights(model)["model.embed_tokens.trained"].data += 1
    save_adapter(model, drafter)
    evaluate(config(plain, drafter, decode=VERIFIED, limit=1, status=True))
    assert "stale: the checkpoint changed" in capsys.readouterr().out


def test_several_cells_share_one_model_with_the_adapter_in_it(plain, drafter):
    (plan,) = make_plans(
        config(plain, drafter, decode=DecodeConfig(policy="verified"), axes=AxesConfig(draft_length=[2, 3]))
    )
    assert plan.checkpoint.model() is plan.checkpoint.model() and plan.checkpoint.model().gate is not None
    rows = [measure(cell, plan.checkpoint, config(plain, drafter), plan.folder, ("r", False)) for cell in plan.cells]
    assert [row["config"]["draft_length"] for row in rows] == [2, 3]
    plan.checkpoint.release()
    assert plan.checkpoint.model().gate is not None  # read again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "a gated adapter drafts behind known text, for decode.policy verified alone, got policy threshold"),
        ({"decode": VERIFIED, "engine": "transformers"}, "engine transformers knows no gated adapter"),
        ({"decode": VERIFIED, "adapter": "absent"}, "absent has no adapter_config.json"),
        (
            {"checkpoint": "", "axes": AxesConfig(checkpoint=["a", "b"])},
            "belongs to one checkpoint, and axes.checkpoint",
        ),
    ],
)
def test_what_cannot_use_an_adapter_refuses_it_before_anything_runs(plain, drafter, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_plans(config(plain, drafter, **changes))


def test_a_checkpoint_that_attends_by_blocks_and_another_base_are_refused(adapted, plain, drafter, project):
    with pytest.raises(ValueError, match="needs a model whose context attends causally"):
        make_plans(config(adapted, drafter, decode=VERIFIED))
    other = load_checkpoint(plain).model()
    other.qwen.load_state_dict(make_qwen(seed=3).state_dict())
    add_adapter(other, AdapterSettings(rank=2), seed=0)
    save_adapter(other, project / "other")
    with pytest.raises(ValueError, match="belongs to a base"):
        evaluate(config(plain, str(project / "other"), decode=VERIFIED))


def test_log_likelihoods_refuse_an_adapter(plain, drafter):
    with pytest.raises(ValueError, match="cannot exercise.*adapter"):
        evaluate(config(plain, drafter, decode=DecodeConfig(), mode="ar", task="toy_letters", max_new_tokens=0))


def test_the_adapter_is_a_model_argument_too(plain, drafter):
    arguments = dict(model_path=plain, adapter=drafter, device="cpu", max_new_tokens=8)
    lm = FastDLLMv2(**arguments, policy="verified", draft_length=3)
    assert lm.mode == "diffusion" and lm.model.gate is not None
    with pytest.raises(ValueError, match="engine transformers knows no gated adapter"):
        FastDLLMv2(**arguments, engine="transformers", mode="ar")


def test_loaded_with_an_adapter_a_checkpoint_writes_what_it_writes_without(plain, drafter):
    drafting, alone = fastdllm.load(plain, device="cpu", adapter=drafter), fastdllm.load(plain, device="cpu")
    for prompt in ("one", "another"):
        assert drafting.generate(prompt, max_new_tokens=20) == alone.generate(prompt, max_new_tokens=20)
    assert drafting.generate("one", max_new_tokens=20, draft_length=2) == alone.generate("one", max_new_tokens=20)
    with pytest.raises(ValueError, match="drafts behind known text"):
        drafting.generate("one", policy="threshold")
