"""train(): learns, logs, exports, resumes exactly; every config file parses."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_qwen
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdllm.__main__ import main
from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import parse, to_yaml
from fastdllm.data.datamodule import DataConfig
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.rows import Request
from fastdllm.model import BlockDiffusionLM
from fastdllm.objective import ObjectiveConfig
from fastdllm.training import run
from fastdllm.training.callbacks import TextSamples
from fastdllm.training.config import TrainConfig, resolve, run_folder
from fastdllm.training.export import export_run, read_weights
from fastdllm.training.lora import LoraSettings
from fastdllm.training.module import OptimizerConfig
from fastdllm.training.requeue import StopOnSignal
from fastdllm.training.run import train
from fastdllm.training.snapshots import newest_complete
from fastdllm.training.strategies import CPUDeepSpeedStrategy
from fastdllm.training.trainer import make_callbacks, make_trainer
from training.conftest import ROOT, by_hand, exported_weights
from training.forked_training import ForkedTraining

REFUSALS = (ValueError, FileNotFoundError, RuntimeError)


def events(config):
    reader = EventAccumulator(str(run_folder(config) / "tensorboard"))
    reader.Reload()
    return reader


def test_training_lowers_the_loss_and_logs_it(make_config):
    config = make_config(sample_every=8, sample_tokens=8, num_samples=2)
    train(config)
    reader = events(config)
    losses = [event.value for event in reader.Scalars("train/loss")]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.2
    tags = reader.Tags()["scalars"]
    assert {"optim/lr", "optim/grad_norm", "val/loss", "throughput/tokens_per_second", "data/tokens"} <= set(tags)
    assert {"train/masked_accuracy", "train/masked_fraction", "val/masked_accuracy"} <= set(tags)
    assert sum(tag.startswith("train/loss_by_noise/") for tag in tags) == 10
    assert "samples/text/text_summary" in reader.Tags()["tensors"]


def test_export_has_the_trained_weights_and_remembers_the_run(make_config):
    objective = ObjectiveConfig(block_size=8, first_token="clean", context_attention="causal", ar_loss_weight=0.3)
    config = make_config(
        task="gsm8k", objective=objective, decode=DecodeConfig(threshold=0.75, sub_block_size=4), max_steps=4
    )
    folder = train(config)
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    exported, trained = load_checkpoint(str(folder)), load_checkpoint(config.checkpoint).qwen
    trained.load_state_dict({name: weight.bfloat16() for name, weight in read_weights(snapshot).items()})
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(exported.qwen(tokens).logits, trained(tokens).logits)
    adaptation = exported.adaptation
    assert (adaptation.task, adaptation.block_size, adaptation.first_token) == ("gsm8k", 8, "clean")
    assert (adaptation.threshold, adaptation.sub_block_size) == (0.75, 4)
    assert (adaptation.context_attention, adaptation.base) == ("causal", Path(config.checkpoint).name)
    assert adaptation.data_tokens == snapshot.data_tokens > 0


def test_autoregressive_run_exports_a_plain_checkpoint(make_config):
    folder = train(make_config(max_steps=2, objective=ObjectiveConfig(kind="autoregressive", block_size=8)))
    assert load_checkpoint(str(folder)).adaptation is None


def test_finished_run_returns_at_once(make_config, capsys):
    config = make_config(max_steps=2)
    train(config)
    before = (run_folder(config) / "export" / "model.safetensors").stat().st_mtime_ns
    train(config)
    assert "finished at step 2; nothing to do" in capsys.readouterr().out
    assert (run_folder(config) / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_micro_batches_do_not_change_the_result(make_config):
    whole, split = make_config(name="whole", micro_batch_size=4), make_config(name="split", micro_batch_size=1)
    train(whole)
    train(split)
    losses = [[event.value for event in events(config).Scalars("train/loss")] for config in (whole, split)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)


def test_time_limit_stops_saves_and_exports(make_config, capsys):
    config = make_config(max_minutes=1e-6)
    train(config)
    assert "max_minutes 1e-06 reached at step 1" in capsys.readouterr().out
    snapshot = newest_complete(run_folder(config) / "checkpoints")
    assert snapshot.step == 1 and snapshot.is_last
    assert (run_folder(config) / "export" / "config.json").is_file()


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(make_config):
    unbroken, broken = make_config(name="unbroken"), make_config(name="broken")
    train(unbroken)
    ForkedTraining(broken).kill_after(5)
    assert newest_complete(run_folder(broken) / "checkpoints").step == 3
    lines = ForkedTraining(broken).finish()
    assert "resumed at step 3" in lines
    first, second = exported_weights(unbroken), exported_weights(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected, found = ({e.step: e.value for e in events(run).Scalars("train/loss")} for run in (unbroken, broken))
    assert found == expected
    snapshots = [newest_complete(run_folder(config) / "checkpoints") for config in (unbroken, broken)]
    assert snapshots[0].data_tokens == snapshots[1].data_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp2", "deepspeed_stage_2", by_hand("deepspeed_stage_1"), "deepspeed_stage_3"]
)
def test_two_processes_train_save_resume_and_export_like_one(make_config, strategy):
    one, two = make_config(name="one"), make_config(name="two", devices=2, strategy=strategy)
    train(one)
    ForkedTraining(two).kill_after(5)
    lines = ForkedTraining(two).finish()
    assert "resumed at step 3" in lines
    assert sum(line.startswith("step 8/8") for line in lines) == 1, "only the first process prints"
    first, second = exported_weights(one), exported_weights(two)
    for name in first:  # bfloat16 weights: the last digit may differ after another order of summation
        torch.testing.assert_close(first[name], second[name], rtol=0.016, atol=1e-4)
    export_run(run_folder(two))
    again = exported_weights(two)
    assert all(torch.equal(second[name], again[name]) for name in again)


def test_batch_that_does_not_divide_is_refused_with_a_way_out(make_config):
    with pytest.raises(REFUSALS, match="global_batch_size must be a multiple .* got 5; try 4"):
        train(make_config(global_batch_size=5))


def test_missing_data_is_found_before_weights_are_loaded(make_config):
    config = make_config(checkpoint="absent/model.gguf")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="absent.jsonl"))
    with pytest.raises(REFUSALS, match="absent.jsonl"):
        train(config)


def test_auto_means_ddp_on_several_devices_only(make_config):
    assert resolve(make_config()).strategy == "auto"
    assert resolve(make_config(devices=2)).strategy == "ddp"
    assert resolve(make_config(devices=2)).accumulate == 1


def test_nodes_count_and_the_trainer_gets_what_the_config_says(make_config):
    config = make_config(num_nodes=2, optimizer=OptimizerConfig(clip_norm=0.25))
    setup = resolve(config)
    assert (setup.world_size, setup.accumulate) == (2, 1)
    trainer = make_trainer(config, setup, [])
    assert (trainer.num_nodes, trainer.gradient_clip_val) == (2, 0.25)
    off = dataclasses.replace(config, num_nodes=1, optimizer=OptimizerConfig(clip_norm=0.0))
    assert make_trainer(off, resolve(off), []).gradient_clip_val is None


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("ddp", DDPStrategy), ("fsdp2", ModelParallelStrategy), ("deepspeed_stage_2", CPUDeepSpeedStrategy)],
)
def test_the_strategy_is_the_one_that_is_named(make_config, strategy, kind):
    config = make_config(devices=2, strategy=strategy)
    assert type(make_trainer(config, resolve(config), []).strategy) is kind


def test_the_module_trains_as_the_config_says(make_config, monkeypatch):
    def note(model, **options):
        raise KeyboardInterrupt(options)

    monkeypatch.setattr(run, "AdaptModule", note)
    with pytest.raises(KeyboardInterrupt) as noted:
        train(make_config(compile="layers", recompute="full", precision="bf16", log_every=3))
    (options,) = noted.value.args
    chosen = [options[name] for name in ("compile_layers", "recompute", "compute_dtype", "log_every")]
    assert chosen == [True, "full", torch.bfloat16, 3]


@pytest.mark.parametrize(
    ("decode", "kind", "message"),
    [
        (DecodeConfig(sub_block_size=16), "block_diffusion", r"sub_block_size must divide .* \(8\), got 16; try 2"),
        (DecodeConfig(policy="verified"), "block_diffusion", "verified needs a model whose context attends causally"),
        (DecodeConfig(policy="verified"), "autoregressive", "verified does nothing in mode ar"),
        (DecodeConfig(fuse_append=True), "autoregressive", "fuse_append needs diffusion decoding"),
    ],
)
def test_what_the_first_text_sample_would_refuse_is_refused_at_once(make_config, decode, kind, message):
    with pytest.raises(ValueError, match=message):
        make_config(decode=decode, objective=ObjectiveConfig(kind=kind, block_size=8))


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        (LoraSettings, {"alpha": 8.0}, "lora.alpha and lora.targets do nothing with lora.rank 0"),
        (LoraSettings, {"targets": ["q_proj"]}, "lora.alpha and lora.targets do nothing with lora.rank 0"),
        (OptimizerConfig, {"schedule": "constant", "min_ratio": 0.5}, "min_ratio 0.5 does nothing .* constant"),
        (DataConfig, {"path": "a/b", "validation_split": "test"}, r"set that to data.path \('a/b'\)"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(section, options, message):
    with pytest.raises(ValueError, match=message):
        section(**options)


def test_samples_are_decoded_as_the_config_says(make_config, byte_tokenizer):
    decode = DecodeConfig(threshold=0.5, sub_block_size=4)
    config = make_config(sample_every=1, num_samples=2, sample_tokens=5, decode=decode)
    sample = {"tokens": np.arange(6), "is_response": np.arange(6) > 3}
    data = SimpleNamespace(validation=[], training=[sample] * 3)
    callbacks = make_callbacks(config, resolve(config), Path(), data, byte_tokenizer, StopOnSignal())
    (samples,) = [callback for callback in callbacks if isinstance(callback, TextSamples)]
    model = BlockDiffusionLM(make_qwen(), block_size=8, mask_token_id=259)
    engine = samples.make_engine(model)
    assert (engine.decode, engine.mode) == (config.decode, "diffusion")
    assert samples.make_requests() == [Request(prompt=[0, 1, 2, 3], max_new_tokens=5)] * 2


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_config_file_parses(file):
    config = parse(TrainConfig, ["--config", str(file)])
    assert config.name == file.stem
    assert len(file.read_text().splitlines()) <= 50
    if file.stem.startswith("adapt_qwen"):
        assert config.max_steps * config.global_batch_size * config.data.sample_length == 1907 * 524_288


def test_fresh_deletes_nothing_before_the_new_run_is_known_to_start(make_config):
    config = make_config(max_steps=2)
    train(config)
    broken = dataclasses.replace(config, fresh=True, checkpoint="absent")
    with pytest.raises(REFUSALS, match="absent"):
        train(broken)
    assert (run_folder(config) / "export" / "config.json").exists()
    before = exported_weights(config)
    train(dataclasses.replace(config, fresh=True, seed=1))
    assert "fresh: false" in (run_folder(config) / "config.yaml").read_text()  # a restart must not delete again
    assert any(not torch.equal(weight, before[name]) for name, weight in exported_weights(config).items()), "the seed"


def test_a_folder_that_is_no_run_is_never_touched(make_config):
    config = make_config(fresh=True)
    run_folder(config).mkdir(parents=True)
    (run_folder(config) / "thesis.tex").touch()
    with pytest.raises(REFUSALS, match="is no run folder"):
        train(config)
    assert (run_folder(config) / "thesis.tex").exists()


def test_a_run_stopped_by_its_time_limit_goes_on_with_a_larger_one(make_config, capsys):
    config = make_config(max_steps=4, max_minutes=1e-9)
    train(config)
    train(config)
    assert "stopped at its time limit (1e-09 minutes) at step 1 of 4" in capsys.readouterr().out
    train(dataclasses.replace(config, max_minutes=0.0))
    assert newest_complete(run_folder(config) / "checkpoints").step == 4


def test_a_process_that_comes_after_the_first_goes_on_too(make_config):
    config = make_config(max_steps=4, max_minutes=1e-9)
    train(config)
    larger = dataclasses.replace(config, max_minutes=0.0)
    (run_folder(config) / "config.yaml").write_text(to_yaml(larger))  # the first process was here
    train(larger)
    assert newest_complete(run_folder(config) / "checkpoints").step == 4


def test_commands_export_and_convert(make_config, tmp_path, monkeypatch, capsys):
    config = make_config(max_steps=2)
    folder = train(config)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["fastdllm", "export", "--run", str(run_folder(config))])
    main()
    assert (folder / "model.safetensors").read_bytes() == before
    arguments = ["--source", str(folder), "--output", str(tmp_path / "copy")]
    monkeypatch.setattr(sys, "argv", ["fastdllm", "convert", *arguments])
    main()
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    monkeypatch.setattr(sys, "argv", ["fastdllm", "exprot"])
    with pytest.raises(SystemExit):
        main()
    assert "did you mean export?" in capsys.readouterr().err
