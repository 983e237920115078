"""Strategy names in YAML -> Lightning strategies, with the forms that run on a CPU."""

import logging
import math
import os
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

StrategyName = Literal["auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"]
NORM_EPSILON = 1e-6  # as in torch's own clipping
SHARDED = ("deepspeed_stage_3", "fsdp2")  # no process holds all weights


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on CPU processes over gloo, which Lightning refuses by a check only; for tests and small machines.

    DeepSpeed compiles a small communication library on first use, so a C++ compiler and ninja must be there.
    """

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # all but the check for CUDA

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, engine_optimizer, _, _ = deepspeed.initialize(  # no device rank: a CPU has none
            config=self.config,
            model=model,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, engine_optimizer


def resolve_strategy(name: StrategyName, world_size: int) -> StrategyName:
    """Return the strategy that "auto" stands for: one device needs none ("auto"), several use "ddp"."""
    return "ddp" if name == "auto" and world_size > 1 else name


def make_strategy(name: StrategyName, accelerator: str, world_size: int) -> Strategy | str:
    """Return what Trainer's `strategy` takes."""
    if name == "auto":
        return "auto"
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True)
    if name == "fsdp2":  # Lightning's own defaults shard over nodes only
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    stage = int(name.removeprefix("deepspeed_stage_"))
    if accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's own switch; else it looks for a GPU library
        return CPUDeepSpeedStrategy(stage=stage, process_group_backend="gloo", logging_level=logging.ERROR)
    return DeepSpeedStrategy(stage=stage, logging_level=logging.ERROR)


def cluster_plugins() -> list[SLURMEnvironment]:
    """Return Trainer's `plugins`: under srun, Slurm's environment without Lightning's requeueing, which saves at any
    point of a step (ours: requeue.py); elsewhere Lightning finds out by itself."""
    is_under_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if is_under_srun else []


def connect(trainer: Trainer, module: LightningModule) -> None:
    """Start the other processes and join them in a group, so that they can agree before the fit, which joins it too."""
    strategy = trainer.strategy
    strategy.connect(module)
    if strategy.launcher is None:
        strategy.setup_environment()
    else:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)


def reshard_zero(strategy: DeepSpeedStrategy, state: Path) -> None:
    """Let the next load read a ZeRO checkpoint that another number of processes wrote; all processes call this.

    Writes DeepSpeed's universal form of it, every parameter whole, into `state`: about as large as the checkpoint.
    """
    if strategy.is_global_zero:
        from deepspeed.checkpoint.ds_to_universal import main

        universal = state / "universal"
        shutil.rmtree(universal, ignore_errors=True)  # of a killed start
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            main(
                Namespace(
                    input_folder=str(state / "checkpoint"),
                    output_folder=str(universal),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
    strategy.barrier("universal checkpoint")
    strategy.config["checkpoint"] = {"load_universal": True}


def lightning_precision(precision: Literal["bf16", "fp16", "fp32"], strategy: StrategyName) -> str:
    """Return Lightning's name of a precision: float32 weights, half-precision products.

    Never "bf16-true": Lightning's cast reaches the rotary frequencies too, radians of phase at position 2048. FSDP2
    takes its compute dtype from the sharding policy, so Lightning is told float32 there.

    Raises:
        ValueError: fp16 with fsdp2, whose gradients nobody would scale.
    """
    if strategy == "fsdp2":
        if precision == "fp16":
            raise ValueError("strategy fsdp2 supports precision bf16 and fp32, got fp16; try ddp or deepspeed_stage_2.")
        return "32-true"
    return {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[precision]


def shard(root: nn.Module, layers: nn.ModuleList, mesh: Any, compute_dtype: torch.dtype) -> None:
    """Shard every layer and then `root` over the data-parallel mesh (FSDP2), in place.

    Computes in `compute_dtype`; keeps weights and reduces gradients in float32. Without this call FSDP2 would train the
    ranks apart without a word, hence the check at the end.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers[:-1]:  # the root keeps the last layer, which the backward pass begins with
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(root, mesh=mesh["data_parallel"], mp_policy=policy)
    whole = [name for name, parameter in root.named_parameters() if not isinstance(parameter, DTensor)]
    assert not whole, f"not sharded: {whole[:3]}"


def gather_whole_layers(strategy: Strategy, layers: nn.ModuleList, is_compiled: bool) -> None:
    """Have ZeRO-3 gather a layer's weights before its call, all at once, as FSDP2 does; others: do nothing.

    By itself it hooks every submodule, and no layer compiles: see `BlockDiffusionLM.use_training_form`. To be called
    before Lightning enters DeepSpeed's context for new models, which replaces torch's linear products.

    The replacement saves no weight for the backward pass, where torch's would keep all gathered weights alive. A graph
    saves the parameter itself, so there it is not needed, and does harm: each layer gets a graph of its own, and on
    torch 2.11 the products with a bias had no gradient.
    """
    if not (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        return
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)
    strategy.config["zero_optimization"]["memory_efficient_linear"] = not is_compiled


def keep_batches_exact(strategy: Strategy) -> None:
    """Have DeepSpeed's precision leave a batch as it is; others do by themselves.

    Lightning would cast all of its floats, and they are numbers to divide by and probabilities, not activations: a sum
    of 2,047 targets is 2,048 in bfloat16.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.precision_plugin.convert_input = lambda batch: batch


def clip_gradients(module: LightningModule, optimizer: Optimizer, largest_norm: float) -> Tensor | None:
    """Have the gradients scaled down to a global norm of `largest_norm`; return the norm before, float32 [].

    A fused optimizer scales them inside its step, which saves reading and writing them once more. Does nothing and
    returns None under DeepSpeed, which clips inside its optimizer step.
    """
    if isinstance(module.trainer.strategy, DeepSpeedStrategy):
        return None
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if optimizer.defaults["fused"]:
        optimizer.grad_scale = None if largest_norm == math.inf else ((norm + NORM_EPSILON) / largest_norm).clamp(min=1)
    else:
        nn.utils.clip_grads_with_norm_(module.parameters(), largest_norm, norm)
    return norm


def deepspeed_gradient_norm(strategy: Strategy) -> Tensor | None:
    """Return the norm that DeepSpeed measured in its last optimizer step; None under other strategies."""
    if not isinstance(strategy, DeepSpeedStrategy):
        return None
    return torch.as_tensor(float(strategy.deepspeed_engine.get_global_grad_norm() or 0.0))


def deepspeed_skipped(strategy: Strategy) -> bool | None:
    """Return whether DeepSpeed left out its last optimizer step, as it does for gradients that are not finite; None
    under other strategies."""
    if not isinstance(strategy, DeepSpeedStrategy):
        return None
    return not strategy.deepspeed_engine.was_step_applied()


def loss_scale(trainer: Trainer) -> float:
    """Return what fp16 multiplies the loss by at present; 1 in other precisions."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return float(trainer.strategy.deepspeed_engine.optimizer.loss_scale)
    plugin = trainer.precision_plugin
    return plugin.scaler.get_scale() if isinstance(plugin, MixedPrecision) and plugin.scaler else 1.0


def read_zero_weights(folder: str) -> dict[str, Tensor]:
    """Return the float32 weights of a DeepSpeed ZeRO checkpoint folder, put together on the CPU."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(folder)
