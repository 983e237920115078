"""Memory is judged before weights are loaded, and the refusal says what would fit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, make_qwen

from fastdllm.checkpoint import add_mask_token, save_checkpoint
from fastdllm.cli import parse
from fastdllm.objective import ObjectiveConfig
from fastdllm.training import run
from fastdllm.training.config import Setup, TrainConfig, resolve
from fastdllm.training.lora import LoraSettings
from fastdllm.training.preflight import (
    CUDA_RESERVE_BYTES,
    GIB,
    MemoryPlan,
    ModelShape,
    check_host_memory,
    check_memory,
    kept_values,
)
from fastdllm.training.run import memory_plan, model_shape
from fastdllm.training.snapshots import newest_complete
from training.conftest import ROOT, by_hand

ONE_GPU = Setup(
    accelerator="cuda",
    devices=1,
    world_size=1,
    strategy="auto",
    precision="bf16",
    precision_reason="",
    accumulate=256,
)
QWEN_1_5B = dict(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
)
QWEN_0_5B = QWEN_1_5B | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
QWEN_7B = QWEN_1_5B | dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4)
QWEN_7B |= dict(vocab_size=152_064, tie_word_embeddings=False)
with torch.device("meta"):
    SHAPES = {f"qwen2.5-{s}": model_shape(make_qwen(**q)) for s, q in (("0.5b", QWEN_0_5B), ("1.5b", QWEN_1_5B))}
    SHAPE_7B = model_shape(make_qwen(**QWEN_7B))
    LORA_PLAN = memory_plan(
        parse(TrainConfig, ["--config", str(ROOT / "configs" / "adapt_qwen1.5b_lora.yaml")]),
        ONE_GPU,
        make_qwen(**QWEN_1_5B),
    )
PLAN = LORA_PLAN.changed(num_lora_parameters=0, recompute="none", micro_batch_size=6)
PLAN = PLAN.changed(rows_per_sample=3 * 1024, targets_per_sample=1024)
ROWS = ROOT / "experiments" / "01_training_throughput" / "rows"
SMALL = ModelShape(num_parameters=1000, num_layers=3, width=4, query_width=4, key_width=2, inner_width=8, vocab_size=10)


def test_one_and_a_half_billion_parameters_fit_a_24_gb_card_with_lora_alone():
    assert (LORA_PLAN.num_parameters, LORA_PLAN.num_lora_parameters) == (1_543_714_304, 73_860_608)
    gibibytes = 2.9 + 1.1 + 7.7 + 0.4 + 2  # frozen, trained, kept values, logits, CUDA
    assert LORA_PLAN.num_bytes / GIB == pytest.approx(gibibytes, abs=0.2)
    check_memory(LORA_PLAN, 22 * GIB, "a 24 GB card")
    with pytest.raises(ValueError, match="22.0 GiB free"):
        check_memory(LORA_PLAN.changed(num_lora_parameters=0), 22 * GIB, "a 24 GB card")
    with pytest.raises(ValueError, match="Nothing tried would fit"):
        check_memory(LORA_PLAN, 8 * GIB, "an 8 GB card")


@pytest.mark.parametrize(
    ("recompute", "values"),
    [  # 6 rows, 2 of which predict something; 3 layers, the last one on these 2 behind its keys and values
        ("none", 3 * 6 * (8 + 8) + (2 * 6 + 2) * (8 + 8 + 24)),
        ("selective", 3 * 6 * (4 + 4) + (2 * 6 + 2) * (4 + 8 + 16)),
        ("full", 3 * 6 * 4 + 2 * 6 * (16 + 16 + 24)),
    ],
)
def test_kept_values_by_hand(recompute, values):
    assert kept_values(SMALL, recompute, num_rows=6, num_targets=2) == values


def small_plan(**changes) -> MemoryPlan:
    fields = dict(shape=SMALL, strategy="auto", is_half_precision=True, world_size=1, micro_batch_size=2)
    fields |= dict(rows_per_sample=6, targets_per_sample=2, is_cuda=False, recompute="selective")
    return MemoryPlan(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [  # weights, gradients, optimizer, activations (536 values), head (40 weights, 40 logits), reserve
        ({}, (4000, 4000, 8000, 2 * 2 * 536, 40 * (4 + 2) + 2 * 40, 0)),
        ({"is_half_precision": False}, (4000, 4000, 8000, 4 * 2 * 536, 40 * 4 + 4 * 40, 0)),
        ({"strategy": "ddp", "world_size": 2}, (4000, 8000, 8000, 2144, 320, 0)),
        ({"strategy": "deepspeed_stage_1", "world_size": 2}, (2000, 2000, 6000, 2144, 40 * 4 + 80, 0)),
        ({"strategy": "deepspeed_stage_2", "world_size": 4}, (2000, 500, 3000, 2144, 240, 0)),
        ({"strategy": "deepspeed_stage_3", "world_size": 4}, (500, 500, 3000, 2144, 240, 0)),
        ({"strategy": "fsdp2", "world_size": 4}, (1000, 1000, 2000, 2144, 320, 0)),
        ({"num_lora_parameters": 10}, (2 * 1000 + 4 * 10, 40, 80, 2144, 80, 0)),
        ({"is_cuda": True}, (4000, 4000, 8000, 2144, 320, CUDA_RESERVE_BYTES)),
    ],
)
def test_parts_by_hand(changes, parts):
    plan = small_plan(**changes)
    assert plan.parts == parts and plan.num_bytes == sum(parts)


@pytest.mark.parametrize(
    ("changes", "checkpoint"),
    [({}, 12_000), ({"strategy": "deepspeed_stage_2"}, 14_000), ({"num_lora_parameters": 10}, 120)],
)
def test_the_disk_holds_the_checkpoints_kept_one_being_written_and_the_export(changes, checkpoint):
    plan = small_plan(**changes)
    assert plan.checkpoint_bytes == checkpoint
    assert plan.disk_bytes(keep_checkpoints=2) == 3 * checkpoint + 2000


@pytest.mark.parametrize("strategy", ["auto", by_hand("deepspeed_stage_2")])
def test_a_checkpoint_is_as_large_as_estimated(make_config, byte_tokenizer, strategy):
    config = make_config(max_steps=1, strategy=strategy, precision="fp32")
    qwen, folder = make_qwen(hidden_size=256, intermediate_size=512), Path(config.output_dir) / "wide"
    mask_token_id = add_mask_token(byte_tokenizer, VOCABULARY)
    save_checkpoint(folder, qwen.state_dict(), qwen.config, byte_tokenizer, mask_token_id, None, dtype=torch.float32)
    config = dataclasses.replace(config, checkpoint=str(folder))
    run.train(config)
    snapshot = newest_complete(run.run_folder(config) / "checkpoints")
    plan = memory_plan(config, resolve(config), qwen)
    assert snapshot.num_bytes == pytest.approx(plan.checkpoint_bytes, rel=0.05)


def measured(names):
    return [json.loads((ROWS / f"{name}.json").read_text()) for name in names]


@pytest.mark.parametrize(
    "row",
    measured(
        [f"qwen2.5-{size}-{layout}" for size in ("0.5b", "1.5b") for layout in ("shared", "dead_rows", "ar")]
        + [f"two_gpus/qwen2.5-1.5b-shared-{name}-a4" for name in ("one", "2-ddp", "2-fsdp2")]
        + [f"two_gpus/qwen2.5-1.5b-shared-2-deepspeed_stage_{stage}-a4" for stage in (1, 2)]
    ),
    ids=lambda row: f"{row['shape']}-{row['layout']}-{row['strategy']}",
)
def test_estimate_is_near_the_measured_peaks_in_the_rows(row):
    objective = ObjectiveConfig(kind="autoregressive" if row["layout"] == "ar" else "block_diffusion")
    sample = objective.sample_shape(row["config"]["sample_length"])
    plan = PLAN.changed(
        shape=SHAPES[row["shape"]],
        strategy=row["strategy"],
        world_size=row["devices"],
        micro_batch_size=row["micro_batch_size"],
        rows_per_sample=sample.num_rows,
        targets_per_sample=sample.num_targets,
        recompute=row["recompute"],
        is_cuda=False,  # peaks of tensors, without what CUDA has beside them
    )
    assert plan.num_bytes / 1e9 == pytest.approx(row["peak_memory_gb"], rel=0.05)


@pytest.mark.parametrize(("shape", "num_samples", "gigabytes"), [("1.5b", 3, 66.9), ("0.5b", 8, 60.6)])
def test_estimate_without_recomputation_is_near_measured_peaks(shape, num_samples, gigabytes):
    """The peaks stand in experiments/01_training_throughput/results.md, "Tried before"; they have no rows."""
    plan = PLAN.changed(shape=SHAPES[f"qwen2.5-{shape}"], micro_batch_size=num_samples, is_cuda=False)
    plan = plan.changed(rows_per_sample=6144, targets_per_sample=2048)
    assert plan.num_bytes / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_sharding_divides_what_it_says():
    two = PLAN.changed(strategy="deepspeed_stage_2", world_size=2)
    four = PLAN.changed(strategy="deepspeed_stage_2", world_size=4)
    assert two.num_bytes - four.num_bytes == pytest.approx(14 * PLAN.num_parameters * (1 / 2 - 1 / 4), abs=2)


def test_refusal_names_a_micro_batch_that_fits():
    check_memory(PLAN, 80 * GIB, "a device")
    with pytest.raises(ValueError, match=r"40.0 GiB free. This would fit: --micro_batch_size 2."):
        check_memory(PLAN, 40 * GIB, "a device")


def test_refusal_names_sharding_where_no_micro_batch_fits():
    with pytest.raises(ValueError, match=r"--strategy deepspeed_stage_2 --micro_batch_size 1 on 4 devices"):
        check_memory(PLAN.changed(shape=SHAPE_7B), 70 * GIB, "a device")


def test_main_memory_must_hold_the_weights_of_every_process():
    check_host_memory(4 * 7_615_616_512, 8, 256 * GIB)
    with pytest.raises(ValueError, match=r"227 GiB in all, and 128 GiB are free. Use at most 4 devices"):
        check_host_memory(4 * 7_615_616_512, 8, 128 * GIB)


@pytest.mark.parametrize(("rank", "bytes_each"), [(0, 4), (4, 2)])
def test_frozen_weights_are_read_in_half_precision(make_config, monkeypatch, rank, bytes_each):
    asked = []
    monkeypatch.setattr(run, "check_host_memory", lambda *parts: asked.append(parts[0]))
    config = make_config(precision="bf16", lora=LoraSettings(rank=rank))
    run.preflight(config, resolve(config))
    assert asked == [bytes_each * sum(parameter.numel() for parameter in make_qwen().parameters())]
