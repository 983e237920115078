"""The Lightning trainer of a run and its callbacks."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from fastdllm.data.datamodule import AdaptDataModule
from fastdllm.decoding.engine import Engine
from fastdllm.decoding.record import note
from fastdllm.decoding.rows import Request
from fastdllm.training.callbacks import Progress, TextSamples, TimeLimit
from fastdllm.training.clock import Clock
from fastdllm.training.config import Setup, TrainConfig
from fastdllm.training.faults import SkippedSteps
from fastdllm.training.requeue import StopOnSignal
from fastdllm.training.resume import SaveCheckpoints
from fastdllm.training.strategies import SHARDED, cluster_plugins, lightning_precision, make_strategy
from fastdllm.training.unmasking import can_draw


def make_trainer(config: TrainConfig, setup: Setup, callbacks: list[Callback]) -> Trainer:
    """Return the trainer that the config asks for, still without a logger."""
    return Trainer(
        accelerator=setup.accelerator,
        devices=setup.devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(setup.strategy, setup.accelerator, setup.world_size),
        precision=lightning_precision(setup.precision, setup.strategy),
        max_steps=config.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=setup.accumulate,
        gradient_clip_val=config.optimizer.clip_norm or None,
        val_check_interval=config.validate_every * setup.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if config.data.validation_path or config.data.validation_samples else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # of self.log, which nothing here uses; its default warns about short runs
        use_distributed_sampler=False,
        logger=False,  # set when it is known where training goes on
        callbacks=callbacks,
        plugins=cluster_plugins(),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def make_callbacks(
    config: TrainConfig,
    setup: Setup,
    checkpoints: Path,
    data: AdaptDataModule,
    tokenizer: Any,
    stop: StopOnSignal,
) -> list[Callback]:
    """Return the callbacks in the order in which they see a step: signal, limit, report, faults, text, save."""
    clock = Clock()
    limits = [TimeLimit(config.max_minutes, clock)] if config.max_minutes else []
    callbacks = [stop, *limits, Progress(clock), SkippedSteps()]
    if config.sample_every and setup.strategy in SHARDED:
        rank_zero_only(print)(f"no text samples under {setup.strategy}: no process holds all weights", flush=True)
    elif config.sample_every:
        callbacks.append(_text_samples(config, data, tokenizer, clock))
    callbacks.append(
        SaveCheckpoints(
            checkpoints,
            every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            strategy=setup.strategy,
            max_minutes=config.max_minutes,
            stop=stop,
            clock=clock,
        )
    )
    return callbacks


def _text_samples(config: TrainConfig, data: AdaptDataModule, tokenizer: Any, clock: Clock) -> TextSamples:
    options = dict(
        tokenizer=tokenizer,
        mode="ar" if config.objective.kind == "autoregressive" else "diffusion",
        decode=config.decode,
        is_fused=False,  # a few requests, on weights that training goes on to change
    )
    if config.sample_trace and not can_draw():
        rank_zero_only(print)(
            "no figure of the sample's unmasking, its text alone: that needs matplotlib (extra eval)", flush=True
        )
    return TextSamples(
        every=config.sample_every,
        make_requests=lambda: _sample_requests(data, config.num_samples, config.sample_tokens),
        make_engine=partial(Engine, is_graphed=False, **options),
        trace=partial(note, **options) if config.sample_trace else None,
        clock=clock,
    )


def _sample_requests(data: AdaptDataModule, num_samples: int, max_new_tokens: int) -> list[Request]:
    """Return the prompts of the first documents of the first samples, of the validation set where there is one."""
    samples = data.validation if len(data.validation) else data.training
    requests = []
    for number in range(min(num_samples, len(samples))):
        sample = samples[number]
        prompt = sample["tokens"][: int(sample["is_response"].argmax())]  # up to the first response token
        requests.append(Request(prompt=prompt.tolist(), max_new_tokens=max_new_tokens))
    return requests
