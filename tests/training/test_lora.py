"""LoRA runs: learn, hold only what is trained, resume exactly, and export dense weights that equal them."""

import dataclasses
import shutil

import pytest
import torch
from conftest import make_qwen
from safetensors.torch import load_file

from fastdllm.checkpoint import empty_model, load_checkpoint, save_checkpoint
from fastdllm.training.config import run_folder
from fastdllm.training.export import export_run, read_weights
from fastdllm.training.lora import LoraSettings, add_lora, frozen_checksum, merged_weights, num_lora_parameters
from fastdllm.training.module import OptimizerConfig
from fastdllm.training.run import train
from fastdllm.training.snapshots import newest_complete
from training.forked_training import ForkedTraining

LORA = LoraSettings(rank=4, alpha=8.0)
REFUSALS = (ValueError, FileNotFoundError, RuntimeError)


def make_unmerged(config):
    """Return the model of a LoRA run, with the updates of its newest checkpoint beside the frozen weights."""
    model = load_checkpoint(config.checkpoint).model()
    add_lora(model, config.lora, seed=99)
    trained = read_weights(newest_complete(run_folder(config) / "checkpoints"))
    model.qwen.load_state_dict(trained, strict=False)
    return model, trained


@torch.no_grad()
def logits(model):
    """Return the logits [1, 12, V] of some tokens, a mask token among them, that all see each other."""
    tokens = torch.arange(12)[None]
    tokens[0, 5] = model.mask_token_id
    attention_mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    return model.logits(model.hidden_states(tokens, torch.arange(12)[None], attention_mask))


def test_a_run_lowers_the_loss_and_exports_what_it_trained(make_config, capsys):
    fast = OptimizerConfig(learning_rate=3e-2, warmup_steps=2)
    config = make_config(lora=LORA, optimizer=fast, sample_every=8, sample_tokens=8, num_samples=1, max_steps=20)
    train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0] - 0.1  # the frozen random head bounds it: logits stay within about 1
    exported = load_checkpoint(str(export_run(run_folder(config), dtype=torch.float32)))
    unmerged, _ = make_unmerged(config)
    expected = logits(unmerged)
    torch.testing.assert_close(logits(exported.model()), expected)
    assert (logits(load_checkpoint(config.checkpoint).model()) - expected)[:, :, :100].abs().max() > 0.1


def test_a_checkpoint_holds_the_updates_and_the_mask_token_alone(make_config):
    config = make_config(lora=LORA, max_steps=2)
    train(config)
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    state = torch.load(snapshot.state, weights_only=True)
    assert all(".lora_" in name or name.endswith("embed_tokens.trained") for name in state["state_dict"])
    num_trained = sum(weight.numel() for weight in state["state_dict"].values())
    assert num_trained == num_lora_parameters(empty_model(config.checkpoint), LORA)
    assert len(state["optimizer_states"][0]["state"]) == len(state["state_dict"])


def test_bfloat16_freezes_in_bfloat16_and_trains_in_float32(make_config):
    config = make_config(lora=LORA, max_steps=2, precision="bf16", sample_every=2, sample_tokens=8, num_samples=1)
    train(config)
    _, trained = make_unmerged(config)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    model = load_checkpoint(config.checkpoint, dtype=torch.bfloat16).model()
    add_lora(model, LORA, seed=0)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(make_config):
    unbroken, broken = make_config(name="unbroken", lora=LORA), make_config(name="broken", lora=LORA)
    train(unbroken)
    ForkedTraining(broken).kill_after(5)
    lines = ForkedTraining(broken).finish()
    assert "resumed at step 3" in lines
    first, second = (load_file(run_folder(c) / "export" / "model.safetensors") for c in (unbroken, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_base_of_the_same_shape_is_refused(make_config, tmp_path, byte_tokenizer):
    source = shutil.copytree(make_config().checkpoint, tmp_path / "source")
    config = make_config(lora=LORA, max_steps=3, max_minutes=1e-9, checkpoint=str(source))
    train(config)  # one step
    assert newest_complete(run_folder(config) / "checkpoints").frozen_checksum
    on, other = dataclasses.replace(config, max_minutes=0.0), make_qwen(seed=1)
    mask_token_id = load_checkpoint(str(source)).mask_token_id
    source.rename(tmp_path / "aside")
    save_checkpoint(source, other.state_dict(), other.config, byte_tokenizer, mask_token_id, None, dtype=torch.float32)
    with pytest.raises(ValueError, match="step-000001.ckpt holds updates of frozen weights with checksum .* --fresh"):
        train(on)
    shutil.rmtree(source)
    (tmp_path / "aside").rename(source)
    train(on)


def test_the_checksum_of_frozen_weights_does_not_depend_on_their_precision(make_config):
    models = [
        load_checkpoint(make_config().checkpoint, dtype=dtype).model() for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [frozen_checksum(model) for model in models] == [0, 0]
    for model in models:
        add_lora(model, LORA, seed=0)
    assert frozen_checksum(models[0]) == frozen_checksum(models[1]) != 0


@pytest.mark.slow
def test_two_processes_train_like_one(make_config):
    one, two = make_config(name="one", lora=LORA), make_config(name="two", lora=LORA, devices=2)
    train(one)
    ForkedTraining(two).finish()
    first, second = (make_unmerged(config)[1] for config in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)  # another order of summation


def test_what_cannot_be_is_refused(make_config):
    with pytest.raises(ValueError, match="needs strategy auto or ddp, got fsdp2"):
        make_config(lora=LORA, strategy="fsdp2")
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"targets": []}, {"targets": ["lm_head"]}, {"targets": ["q_proj"] * 2}):
        with pytest.raises(ValueError, match=f"lora.{next(iter(wrong))} must"):
            LoraSettings(**wrong)


def test_updates_of_other_targets_are_not_merged(make_config):
    config = make_config(lora=dataclasses.replace(LORA, targets=["q_proj"]), max_steps=1)
    train(config)
    _, trained = make_unmerged(config)
    with pytest.raises(ValueError, match="does not hold the updates of lora.targets"):
        merged_weights(load_checkpoint(config.checkpoint).model(), trained, LORA)
