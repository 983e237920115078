"""Runs with adapt gated_lora: the drafts get better, the model stays, and the export is an adapter of it."""

import dataclasses
import json

import pytest
import torch
from conftest import make_qwen
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdllm.adapter import AdapterSettings, adapter_weights, load_adapter, num_adapter_parameters
from fastdllm.checkpoint import empty_model, load_checkpoint, save_checkpoint
from fastdllm.cli import parse
from fastdllm.config_json import Adaptation
from fastdllm.data.datamodule import AdaptDataModule, DataConfig, TrainingSamples, ValidationSamples
from fastdllm.decoding.config import DecodeConfig
from fastdllm.draft import NO_ANCHOR, DraftConfig, draft_windows
from fastdllm.objective import ObjectiveConfig
from fastdllm.training.config import Setup, TrainConfig, learnt, run_folder
from fastdllm.training.export import export_run, read_weights
from fastdllm.training.lora import LoraSettings
from fastdllm.training.module import OptimizerConfig
from fastdllm.training.preflight import GIB
from fastdllm.training.run import memory_plan, train
from fastdllm.training.snapshots import newest_complete
from training.conftest import ROOT, run_program

ADAPTER, DRAFT = AdapterSettings(rank=4, alpha=8.0), DraftConfig(window=4)


@pytest.fixture
def make_gated(make_config):
    def make(**changes):
        fields = dict(adapt="gated_lora", adapter=ADAPTER, draft=DRAFT, objective=ObjectiveConfig())
        return make_config(**{**fields, **changes})

    return make


def logged(config, tag):
    reader = EventAccumulator(str(run_folder(config) / "tensorboard"))
    reader.Reload()
    return [event.value for event in reader.Scalars(tag)]


def trained_weights(config):
    return read_weights(newest_complete(run_folder(config) / "checkpoints"))


def test_a_run_lowers_the_draft_loss_and_exports_the_adapter(make_gated, tmp_path, capsys):
    config = make_gated(
        checkpoint=str(ROOT / "data" / "tiny"),  # has something to draft: a random model's head cannot say a token
        data=DataConfig(
            path=str(ROOT / "data" / "tiny" / "test.jsonl"),
            sample_length=128,
            validation_samples=4,
            cache_dir=str(tmp_path / "prepared"),
            num_workers=0,
            loader_workers=0,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        max_steps=12,
        validate_every=6,
        task="gsm8k",
    )
    folder = train(config)
    losses, validation = logged(config, "train/loss"), logged(config, "val/loss")
    assert losses[-1] < losses[0] - 4 and validation[-1] < validation[0] < losses[0] - 2
    accepted = logged(config, "train/accepted_length")
    assert accepted[-1] > accepted[0] and "accepted " in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "fastdllm.json")
    ]
    export_run(run_folder(config), dtype=torch.float32)
    model = load_checkpoint(config.checkpoint).model()
    load_adapter(model, folder)
    trained = trained_weights(config)
    assert all(torch.equal(weight, trained[name]) for name, weight in adapter_weights(model).items())
    gate = json.loads((folder / "fastdllm.json").read_text())
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    assert (gate["window"], gate["task"], gate["data_tokens"]) == (4, "gsm8k", snapshot.data_tokens)


def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(make_gated):
    config = make_gated(max_steps=2)
    train(config)
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    state = torch.load(snapshot.state, weights_only=True)
    num_trained = sum(weight.numel() for weight in state["state_dict"].values())
    assert num_trained == num_adapter_parameters(empty_model(config.checkpoint), ADAPTER)
    assert len(state["optimizer_states"][0]["state"]) == len(state["state_dict"]) == 2 * 2 * 7 + 1


def test_bfloat16_freezes_in_bfloat16_and_trains_in_float32(make_gated):
    config = make_gated(max_steps=2, precision="bf16", recompute="selective")
    train(config)
    before = load_checkpoint(config.checkpoint).model()
    load_adapter(before, run_folder(config) / "export")  # the base's checksum is that of float32 weights
    trained = trained_weights(config)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert any(name.endswith(".expand") and weight.any() for name, weight in trained.items())


def test_micro_batches_do_not_change_the_result(make_gated):
    decaying = dataclasses.replace(DRAFT, decay=0.8)
    runs = [make_gated(name=f"by{size}", micro_batch_size=size, draft=decaying, max_steps=4) for size in (4, 1)]
    for config in runs:
        train(config)
    losses = [torch.tensor(logged(config, "train/loss")) for config in runs]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)


def test_a_run_goes_on_where_its_time_limit_stopped_it(make_gated):
    whole, parted = make_gated(name="whole", max_steps=3), make_gated(name="parted", max_steps=3, max_minutes=1e-9)
    train(whole)
    train(parted)  # one step
    train(dataclasses.replace(parted, max_minutes=0.0))
    first, second = trained_weights(whole), trained_weights(parted)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.by_hand
def test_killed_run_resumes_bit_for_bit(make_gated):
    unbroken, broken = make_gated(name="unbroken"), make_gated(name="broken")
    train(unbroken)
    run_program(broken, kill_after=5)
    assert "resumed at step 3" in run_program(broken)
    files = [(run_folder(c) / "export" / "adapter_model.safetensors").read_bytes() for c in (unbroken, broken)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_two_processes_train_like_one(make_gated):
    one, two = make_gated(name="one"), make_gated(name="two", devices=2)
    train(one)
    run_program(two)
    first, second = trained_weights(one), trained_weights(two)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)  # another order of summation


def test_step_targets_are_the_weights_of_the_whole_steps_windows(make_gated, byte_tokenizer):
    config = make_gated(draft=dataclasses.replace(DRAFT, decay=0.8))
    mask_token_id = load_checkpoint(config.checkpoint).mask_token_id
    module = AdaptDataModule(
        config.data, byte_tokenizer, mask_token_id=mask_token_id, objective=learnt(config), seed=0, micro_batch_size=2
    )
    module.prepare_data()
    samples = TrainingSamples(module.training, seed=0, samples_per_step=4)
    step = [samples[index] for index in range(4, 8)]
    batch = {name: torch.stack([sample[name] for sample in step]) for name in step[0]}
    expected = draft_windows(batch, config.draft).targets.weight.sum()
    torch.testing.assert_close(batch["step_targets"], expected.expand(4))
    assert (batch["anchor"] != NO_ANCHOR).sum() > 30
    assert module.training.packing.fill > 0.8  # of clean rows: documents are not padded to blocks of 32
    validation = ValidationSamples(module.validation)
    beyond = validation[len(module.validation)]
    assert (beyond["anchor"] == NO_ANCHOR).all() and torch.equal(validation[0]["anchor"], validation[0]["anchor"])


def test_other_weights_than_those_trained_on_are_not_exported(make_gated, tmp_path, byte_tokenizer):
    config, source = make_gated(max_steps=1), tmp_path / "source"
    weights, mask_token_id = make_qwen(), load_checkpoint(config.checkpoint).mask_token_id

    def write(qwen, adaptation=None):
        arguments = (source, qwen.state_dict(), qwen.config, byte_tokenizer, mask_token_id, adaptation)
        save_checkpoint(*arguments, dtype=torch.float32)

    write(weights)
    config = dataclasses.replace(config, checkpoint=str(source))
    train(config)
    write(make_qwen(seed=1))
    with pytest.raises(ValueError, match="put back the checkpoint that the run started from"):
        export_run(run_folder(config))
    write(weights, Adaptation(block_size=32, sub_block_size=8))
    with pytest.raises(ValueError, match="was adapted with context_attention block; start from the model"):
        train(dataclasses.replace(config, name="other"))


def test_what_does_not_go_with_it_is_refused(make_gated, make_config):
    assert make_gated(objective=ObjectiveConfig(context_attention="causal")).draft == DRAFT
    for wrong, message in (
        ({"strategy": "fsdp2"}, "needs strategy auto or ddp, got fsdp2"),
        ({"lora": LoraSettings(rank=4)}, "leave lora.rank 0, got 4"),
        ({"sample_every": 5}, "writes no text samples, got sample_every 5"),
        ({"objective": ObjectiveConfig(block_size=16)}, "section objective says nothing"),
        ({"decode": DecodeConfig(threshold=0.5)}, "section decode says nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            make_gated(**wrong)
    for wrong in ({"adapter": ADAPTER}, {"draft": DRAFT}):
        with pytest.raises(ValueError, match=f"section {next(iter(wrong))} says nothing under adapt weights"):
            make_config(**wrong)


def test_a_1_5b_fits_a_24_gb_card_by_the_estimate():
    """docs/concepts/lossless.md works it out."""
    arguments = ["--config", str(ROOT / "configs" / "draft_gsm8k_0.5b.yaml"), "--micro_batch_size", "1"]
    config = parse(TrainConfig, [*arguments, "--data.sample_length", "2048"])
    one_gpu = dict(devices=1, world_size=1, strategy="auto", precision="bf16", precision_reason="", accumulate=16)
    shape = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    with torch.device("meta"):
        qwen = make_qwen(vocab_size=151_936, num_key_value_heads=2, **shape)
    plan = memory_plan(config, Setup(accelerator="cuda", **one_gpu), qwen)
    assert (plan.num_lora_parameters, plan.kept_of_context) == (73_860_608, 2048 * 28 * 2 * 2 * 128)
    kept = 28 * 2048 * (4 * 1536 + 4 * 1536 + 3 * 8960) + plan.kept_of_context
    logits = 3 * 2**26  # values of the part that is there at a time
    parts = [2 * 1_543_714_304, (4 + 4 + 8) * 73_860_608, 2 * kept, 2 * logits, 2 * GIB]
    assert plan.num_bytes == sum(parts)
    assert plan.num_bytes / GIB == pytest.approx(10.59, abs=0.01)
