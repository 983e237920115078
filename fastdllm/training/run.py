"""train(): from a config to a trained, exported checkpoint in its run folder."""

import dataclasses
import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from fastdllm.adapter import add_adapter, num_adapter_parameters
from fastdllm.checkpoint import Checkpoint, empty_model, load_checkpoint
from fastdllm.cli import to_yaml
from fastdllm.data.datamodule import AdaptDataModule
from fastdllm.masks import FLEX_TILE
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import device_name, memory_bytes, pick_device, write_text
from fastdllm.training.config import (
    DTYPES,
    Setup,
    TrainConfig,
    has_frozen_weights,
    learnt,
    resolve,
    run_folder,
)
from fastdllm.training.export import EXPORT_FOLDER, exported_step, write_export
from fastdllm.training.lora import add_lora, num_lora_parameters
from fastdllm.training.module import AdaptModule
from fastdllm.training.preflight import MemoryPlan, ModelShape, check_host_memory, check_memory
from fastdllm.training.requeue import StopOnSignal, leave
from fastdllm.training.resume import CONFIG_FILE, check_run, locked, make_ready, remove_run
from fastdllm.training.snapshots import Snapshot, newest_complete, remove_leftovers
from fastdllm.training.strategies import connect
from fastdllm.training.trainer import make_callbacks, make_trainer

KNOWN_WARNINGS = (
    ".*LeafSpec.*",  # Lightning 2.6 on torch 2.13
    ".*all_gather_into_tensor.*",  # DeepSpeed 0.19 on torch 2.13
    "Since DeepSpeed handles gradient clipping.*",  # our own clipping leaves it to DeepSpeed
    "When saving the DeepSpeed Stage 3 checkpoint.*",  # the export reads the shards
    ".*`srun` command is available.*",  # said on every machine that has Slurm
    ".*Detected that context_fn is passed to torch.utils.checkpoint.*",  # our layers have no in-place operations
)


def train(config: TrainConfig) -> Path | None:
    """Train, resuming where the run folder stands, and return the export's folder (None on all but the first process).

    SIGUSR1 and SIGTERM end training early, saved and without an export (requeue.py).

    Raises:
        ValueError, FileNotFoundError, RuntimeError: data, memory, devices or the run folder do not allow it; most
            is found before weights are loaded.
    """
    _quieten_libraries()
    run, is_first = run_folder(config), rank_zero_only.rank == 0
    with ExitStack() as stack:
        stop = stack.enter_context(StopOnSignal())
        setup = resolve(config)
        if is_first:
            stack.enter_context(locked(run))
            check_run(run, config)
        snapshot = None if config.fresh else newest_complete(run / "checkpoints", read_contents=is_first)
        is_done = snapshot is not None and _is_done(config, snapshot)
        if is_done and not is_first:  # the first process has read the files and may have passed this one over
            is_done = newest_complete(run / "checkpoints") == snapshot
        if is_done and exported_step(run) == snapshot.step:
            return run / EXPORT_FOLDER
        if is_first:
            preflight(config, setup)
        source = load_checkpoint(config.checkpoint, dtype=_source_dtype(config, setup))
        _check_source(config, source)
        if is_first:
            _open_run(config, snapshot)
        if not is_done:
            _fit(config, setup, source, snapshot, stop)
        if stop.agreed:
            return leave(stop.agreed, is_first)
        return write_export(run) if is_first else None


def _is_done(config: TrainConfig, snapshot: Snapshot) -> bool:
    """Return whether there is nothing left to train, saying so: the last step, or an unchanged time limit."""
    if snapshot.step == config.max_steps:
        rank_zero_only(print)(
            f"{run_folder(config)} finished at step {snapshot.step}; nothing to do (--fresh starts anew)", flush=True
        )
        return True
    if snapshot.is_last and snapshot.max_minutes == config.max_minutes:
        rank_zero_only(print)(
            f"{run_folder(config)} stopped at its time limit ({config.max_minutes:g} minutes) at step {snapshot.step} "
            f"of {config.max_steps}; raise --max_minutes to go on, --fresh starts anew",
            flush=True,
        )
        return True
    return False


def _quieten_libraries() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _open_run(config: TrainConfig, snapshot: Snapshot | None) -> None:
    """Make the run folder ready: emptied if asked to, without leftovers, with the config that a restart compares."""
    run = run_folder(config)
    if config.fresh:
        remove_run(run)
    remove_leftovers(run / "checkpoints", snapshot)
    write_text(run / CONFIG_FILE, to_yaml(dataclasses.replace(config, fresh=False)))


def preflight(config: TrainConfig, setup: Setup) -> None:
    """Check data, source model and memory without loading weights, and print what the run is going to be.

    Raises:
        ValueError, FileNotFoundError: something is missing; the message says what would do.
    """
    check_data(config, setup)
    plan = memory_plan(config, setup, empty_model(config.checkpoint))
    check_fit(config, setup, plan)
    device = pick_device(setup.accelerator)
    print(
        f"{run_folder(config)}: {plan.num_parameters / 1e6:,.1f}M parameters of {config.checkpoint} on "
        f"{setup.world_size} x {device_name(device)}, strategy {setup.strategy}, about "
        f"{plan.num_bytes / 2**30:.1f} GiB a device\n"
        f"precision {setup.precision} ({setup.precision_reason}); a step is {setup.accumulate} x "
        f"{config.micro_batch_size} samples of {config.data.sample_length} tokens on {setup.world_size} devices",
        flush=True,
    )


def _check_source(config: TrainConfig, source: Checkpoint) -> None:
    """Raise a ValueError if a gated adapter could not be verified by the source: by clean rows, token by token."""
    adaptation = source.adaptation
    if config.adapt == "gated_lora" and adaptation is not None and adaptation.context_attention != "causal":
        raise ValueError(
            f"adapt gated_lora needs a model that writes token by token, and {config.checkpoint} was adapted with "
            f"context_attention {adaptation.context_attention}; start from the model that it was made of "
            f"({adaptation.base or 'not remembered'})."
        )


def check_data(config: TrainConfig, setup: Setup) -> None:
    """Raise ValueError or FileNotFoundError for data that cannot be reached, or samples of a length that cannot be."""
    config.data.check_sources()
    length = config.data.sample_length
    if setup.accelerator == "cuda" and length % FLEX_TILE:
        raise ValueError(f"data.sample_length must be a multiple of {FLEX_TILE} (FlexAttention's tile), got {length}.")
    num_targets = learnt(config).sample_shape(length).num_targets
    if setup.accelerator == "cuda" and config.adapt == "gated_lora" and num_targets % FLEX_TILE:
        raise ValueError(
            f"draft.rows_per_token {config.draft.rows_per_token:g} gives a sample {num_targets} rows of windows, which "
            f"must be a multiple of {FLEX_TILE} (FlexAttention's tile); try {max(1, num_targets // FLEX_TILE)} x "
            f"{FLEX_TILE} / {length}."
        )


def check_fit(config: TrainConfig, setup: Setup, plan: MemoryPlan) -> None:
    """Raise a ValueError that says what would fit, if the memory of a device or of this machine is too small."""
    device = pick_device(setup.accelerator)
    check_memory(plan, free_bytes(setup), device_name(device))
    weight_bytes = plan.num_parameters * _source_dtype(config, setup).itemsize
    check_host_memory(weight_bytes, setup.devices, memory_bytes(torch.device("cpu")))


def free_bytes(setup: Setup) -> int:
    """Return the free memory for one process: that of its GPU, or its share of the machine's."""
    free = memory_bytes(pick_device(setup.accelerator))
    return free if setup.accelerator == "cuda" else free // setup.devices


def memory_plan(config: TrainConfig, setup: Setup, model: nn.Module) -> MemoryPlan:
    """Return what decides the memory of one process; `model` is a Qwen2ForCausalLM, which may be without storage."""
    return MemoryPlan(
        shape=model_shape(model),
        strategy=setup.strategy,
        is_half_precision=setup.precision != "fp32",
        world_size=setup.world_size,
        micro_batch_size=config.micro_batch_size,
        rows_per_sample=_rows_with_gradient(config),
        targets_per_sample=learnt(config).sample_shape(config.data.sample_length).num_targets,
        is_cuda=setup.accelerator == "cuda",
        recompute=config.recompute,
        num_lora_parameters=_num_updates(config, model),
        kept_of_context=_kept_of_context(config, model),
    )


def _num_updates(config: TrainConfig, model: nn.Module) -> int:
    if config.adapt == "gated_lora":
        return num_adapter_parameters(model, config.adapter)
    return num_lora_parameters(model, config.lora)


def _rows_with_gradient(config: TrainConfig) -> int:
    """Return the rows of a sample that the backward pass goes through."""
    shape = learnt(config).sample_shape(config.data.sample_length)
    return shape.num_targets if config.adapt == "gated_lora" else shape.num_rows


def _kept_of_context(config: TrainConfig, model: nn.Module) -> int:
    """Return the values of a sample's rows without gradient that are kept: keys and values of each layer."""
    if config.adapt != "gated_lora":
        return 0
    attention = [module for name, module in model.named_modules() if name.endswith((".k_proj", ".v_proj"))]
    return config.data.sample_length * sum(module.out_features for module in attention)


def model_shape(model: nn.Module) -> ModelShape:
    """Return the sizes of a Qwen2ForCausalLM, which may be without storage."""
    config, attention = model.config, model.model.layers[0].self_attn
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        query_width=attention.q_proj.out_features,
        key_width=attention.k_proj.out_features,
        inner_width=config.intermediate_size,
        vocab_size=config.vocab_size,
    )


def _source_dtype(config: TrainConfig, setup: Setup) -> torch.dtype:
    """Return the dtype that the source's weights are loaded in: frozen ones in what is computed in."""
    return DTYPES[setup.precision] if has_frozen_weights(config) else torch.float32


def _fit(config: TrainConfig, setup: Setup, source: Checkpoint, snapshot: Snapshot | None, stop: StopOnSignal) -> None:
    """Train from the snapshot, or from the source, to the last step."""
    torch._dynamo.reset()  # graphs of an earlier run in this process would count towards the limit
    if setup.accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
        warnings.filterwarnings("error", message="flex_attention called without torch.compile")
    module = AdaptModule(
        _make_model(config, source),
        objective=learnt(config),
        optimizer=config.optimizer,
        max_steps=config.max_steps,
        log_every=config.log_every,
        sample_length=config.data.sample_length,
        compute_dtype=DTYPES[setup.precision],
        compile_layers=config.compile == "layers" or (config.compile == "auto" and setup.accelerator == "cuda"),
        recompute=config.recompute,
    )
    data = AdaptDataModule(
        config.data,
        source.tokenizer,
        mask_token_id=source.mask_token_id,
        objective=learnt(config),
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
    )
    callbacks = make_callbacks(config, setup, run_folder(config) / "checkpoints", data, source.tokenizer, stop)
    trainer = make_trainer(config, setup, callbacks)
    connect(trainer, module)
    snapshot = trainer.strategy.broadcast(snapshot)  # the first process has read every file
    if snapshot is not None:
        rank_zero_only(print)(f"resumed at step {snapshot.step}", flush=True)
        make_ready(trainer, module, snapshot)
    trainer.logger = TensorBoardLogger(
        run_folder(config), name="", version="tensorboard", purge_step=snapshot.step + 1 if snapshot else 1
    )
    trainer.fit(module, data, ckpt_path=snapshot.state if snapshot else None)


def _make_model(config: TrainConfig, source: Checkpoint) -> BlockDiffusionLM:
    """Return the source's model, with the updates that the config asks for."""
    is_causal = config.objective.kind == "autoregressive" or config.adapt == "gated_lora"
    model = BlockDiffusionLM(
        source.qwen,
        block_size=config.objective.block_size,
        mask_token_id=source.mask_token_id,
        context_attention="causal" if is_causal else config.objective.context_attention,
    )
    if config.adapt == "gated_lora":
        add_adapter(model, config.adapter, config.seed)
    elif config.lora.rank:
        add_lora(model, config.lora, config.seed)
    return model
