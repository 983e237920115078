"""Checkpoints, run folders, and what decides a measurement."""

import dataclasses
import os
from pathlib import Path

import pytest

from fastdllm.checkpoint import load_checkpoint
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.evaluation.arguments import parse_arguments
from fastdllm.evaluation.config import AxesConfig, EvaluateConfig
from fastdllm.evaluation.settings import (
    canonical_subset,
    harness_arguments,
    make_plans,
    newest_export,
    resolve_settings,
)
from fastdllm.evaluation.sweep import cell_state, make_cell

ROOT = Path(__file__).resolve().parents[2]


def test_without_any_export_the_error_says_what_to_do(project):
    with pytest.raises(FileNotFoundError, match="train.py --config configs/demo.yaml"):
        newest_export()


def test_newest_export_is_by_time_not_by_name(project):
    for name, when in (("b", 1_000), ("a", 2_000)):
        folder = project / "runs" / name / "export"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (when, when))
    assert newest_export().parent.name == "a"


def test_each_form_of_the_threshold_wins_in_its_turn(adapted):
    checkpoint = load_checkpoint(adapted)  # remembers 0.8
    for changes, threshold in (
        ({}, 0.8),
        ({"decode": DecodeConfig(threshold=0.6)}, 0.6),
        ({"threshold": 0.9}, 0.9),
        ({"threshold": 1.0}, 1.0),
    ):
        assert resolve_settings(EvaluateConfig(**changes), checkpoint)["threshold"] == threshold


def test_seed_and_prompt_decide_the_measurement_and_reach_the_model(adapted):
    config = EvaluateConfig(seed=7, prompt="lm_eval", decode=DecodeConfig(temperature=0.5, top_p=0.75))
    settings = resolve_settings(config, load_checkpoint(adapted))
    arguments = parse_arguments(harness_arguments(settings))
    assert (arguments.seed, arguments.prompt, arguments.decode.top_p) == (7, "lm_eval", 0.75)
    cell = make_cell(settings).settings
    assert (cell["seed"], cell["prompt"], cell["top_p"]) == (7, "lm_eval", 0.75)


def test_a_list_that_is_a_named_subset_gets_its_name():
    assert canonical_subset("3,1,2", 8) == "first"
    assert canonical_subset("5,2", 8) == "2,5"
    assert canonical_subset("last", 8) == "last"


def cells(**changes):
    return [cell for plan in make_plans(EvaluateConfig(device="cpu", **changes)) for cell in plan.cells]


def test_the_bundled_rows_are_done(project, monkeypatch):
    monkeypatch.chdir(ROOT)
    for changes, count in (({"grid": True}, 7), ({"threshold": 1.0}, 1)):
        config = EvaluateConfig(checkpoint="data/tiny-adapted", device="cpu", **changes)
        (plan,) = make_plans(config)
        folder = ROOT / "data" / "tiny-adapted" / "rows"
        states = [cell_state(cell, folder, plan.checkpoint.digest) for cell in plan.cells]
        assert states == ["done"] * count


def test_axes_stand_in_for_the_settings_and_the_export_gives_the_rest(adapted):
    made = cells(axes=AxesConfig(batch_size=[1, 8], task=["toy_problems", "toy_letters"]))
    assert [(one.settings["task"], one.settings["batch_size"]) for one in made] == [
        ("toy_problems", 1), ("toy_problems", 8), ("toy_letters", 1), ("toy_letters", 8),
    ]  # fmt: skip
    assert {one.settings["threshold"] for one in made} == {0.8}  # remembered
    made = cells(axes=AxesConfig(threshold=[0.5, 1.0], policy=["threshold", "factor", "fixed"]))
    chosen = ("policy", "threshold", "policy_parameter")
    assert [tuple(one.settings[name] for name in chosen) for one in made] == [
        ("threshold", 0.5, None), ("threshold", 1.0, None), ("factor", None, 1.0), ("fixed", None, 2.0),
    ]  # fmt: skip


def test_adaptive_reuse_and_active_rows_name_their_cells(adapted):
    adaptive = {"schedule": "adaptive", "reuse_mode": "delta", "subset": "1"}
    made = cells(**adaptive, axes=AxesConfig(budget=[0.05, 0.1]))
    assert [one.grid_names[0] for one in made] == ["adaptive_0.05_first", "adaptive_0.1_first"]
    assert all("reuse_mode=delta" in one.name and one.settings["reuse_k"] is None for one in made)
    made = cells(axes=AxesConfig(reuse_k=[1, 2], active_rows=["all", "needed"]))
    assert [(one.settings["reuse_k"], one.settings["active_rows"]) for one in made] == [
        (1, "all"), (1, "needed"), (2, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"axes": AxesConfig(sub_block_size=[8, 12])}, "sub_block_size must divide the block size.*got 12"),
        ({"axes": AxesConfig(subset=["first"])}, "subset first: without effect in any cell"),
        ({"seed": 3}, "seed 3: without effect at temperature 0, which draws nothing"),
        ({"decode": DecodeConfig(top_p=0.5)}, "top_p 0.5: without effect at temperature 0"),
        ({"axes": AxesConfig(policy=["factor"], threshold=[0.5])}, "threshold 0.5: without effect"),
        ({"axes": AxesConfig(policy=["verified"])}, "context attends causally, got context_attention block"),
        ({"axes": AxesConfig(draft_length=[4])}, "draft_length 4: without effect in any cell"),
        ({"axes": AxesConfig(budget=[0.1])}, "budget 0.1: without effect"),
        ({"budget": 0.1, "axes": AxesConfig(batch_size=[1])}, "budget 0.1: without effect"),
        ({"active_rows": "needed", "axes": AxesConfig(reuse_k=[2, 3])}, "active_rows needed: without effect"),
        ({"reuse_k": 2, "axes": AxesConfig(subset=["first", "nowhere"])}, "subset must be first, middle.*'nowhere'"),
        ({"reuse_k": 2, "axes": AxesConfig(subset=["9"])}, "must name layers from 0 to"),
        ({"schedule": "adaptive", "axes": AxesConfig(reuse_mode=["delta", "output"])}, "needs reuse_mode delta or"),
        ({"schedule": "adaptive", "reuse_mode": "attn", "subset": "0"}, "leave layer 0 out"),
        ({"grid": True, "decode": DecodeConfig(fuse_append=True)}, "fuse_append needs diffusion decoding without"),
    ],
)
def test_values_that_cannot_be_or_change_nothing_are_refused_before_anything_runs(adapted, changes, message):
    with pytest.raises(ValueError, match=message):
        cells(**changes)


def test_what_belongs_to_blocks_is_refused_where_drafts_are_verified(causal):
    verified = DecodeConfig(policy="verified")
    made = cells(decode=verified, axes=AxesConfig(draft_length=[0, 4, 7]))
    assert [one.settings["draft_length"] for one in made] == [0, 4, 7]
    assert "policy=verified-draft_length=4" in made[1].name and "draft_length" not in made[2].name
    for changes, message in (
        ({"reuse_k": 2}, "reuse_k 2: without effect"),
        ({"grid": True}, "reuse_k 2, .*without effect"),
        ({"decode": dataclasses.replace(verified, sub_block_size=4)}, "sub_block_size 4: without effect"),
        ({"decode": dataclasses.replace(verified, use_block_cache=False)}, "use_block_cache False: without effect"),
        ({"active_rows": "needed"}, "active_rows needed: without effect"),
        ({"axes": AxesConfig(draft_length=[65])}, "draft_length must be 1 to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            cells(**{"decode": verified, **changes})


def test_several_checkpoints_follow_one_another_and_the_plain_one_is_one_cell(adapted, plain):
    axes = AxesConfig(checkpoint=[plain, adapted], reuse_k=[1, 2], task=["toy_problems"])
    plans = make_plans(EvaluateConfig(device="cpu", axes=axes))
    names = [[cell.grid_names[0] for cell in plan.cells] for plan in plans]
    assert names == [["ar"], ["k1_first", "k2_first"]]
    assert [plan.folder.name for plan in plans] == ["plain", "tried"]
    with pytest.raises(ValueError, match="both called tried"):
        make_plans(EvaluateConfig(device="cpu", axes=AxesConfig(checkpoint=[adapted, adapted])))
    with pytest.raises(ValueError, match="threshold 0.5: without effect in mode ar, which .*plain is decoded in"):
        make_plans(EvaluateConfig(device="cpu", axes=AxesConfig(checkpoint=[plain], task=["x"], threshold=[0.5])))


def test_rows_of_a_gpu_are_listed_without_one_if_their_dtype_is_named(adapted, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for purpose in ({"status": True}, {"dry_run": True}):
        config = EvaluateConfig(checkpoint=adapted, device="cuda", dtype="float16", **purpose)
        ((cell,),) = [plan.cells for plan in make_plans(config)]
        assert (cell.settings["device"], cell.settings["dtype"]) == ("cuda", "float16")
        with pytest.raises(ValueError, match="needs a CUDA GPU"):
            make_plans(dataclasses.replace(config, dtype="auto"))
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        make_plans(dataclasses.replace(config, dry_run=False))
