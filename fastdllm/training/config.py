"""TrainConfig: what a training run is told; and what that means on a machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastdllm.adapter import AdapterSettings
from fastdllm.data.datamodule import DataConfig
from fastdllm.data.packing import Objective
from fastdllm.decoding.config import DecodeConfig, check_decoding
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.draft import DraftConfig
from fastdllm.model import Recompute
from fastdllm.objective import ObjectiveConfig
from fastdllm.runtime import get_optimal_dtype, pick_device
from fastdllm.training.lora import LoraSettings
from fastdllm.training.module import OptimizerConfig
from fastdllm.training.strategies import StrategyName, lightning_precision, resolve_strategy

AT_LEAST_ONE = (
    "max_steps",
    "num_nodes",
    "micro_batch_size",
    "global_batch_size",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "num_samples",
    "sample_tokens",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: adapts a checkpoint to block diffusion, trains it autoregressively, or teaches it to draft."""

    name: str
    """Name of the run; its folder is <output_dir>/<name>. The same name goes on where an interrupted run stopped."""
    checkpoint: str
    """Model to start from: a hub id, a local HF folder or a local .gguf file (Qwen2.5 family)."""
    max_steps: int
    """Optimizer steps of the whole run, 1 or more; the learning-rate schedule spans them."""
    adapt: Literal["weights", "gated_lora"] = "weights"
    """What is trained: weights, those of the model or lora's updates of them, by the section objective; or gated_lora,
    updates of mask rows alone, which draft for the model as it is (sections adapter and draft). Clean rows then stay
    what they were, so their attention is token by token."""
    output_dir: str = "runs"
    """Folder of the run folders."""
    fresh: bool = False
    """Delete the run folder of that name and start anew."""
    seed: int = 0
    """Seed of data order and noise, 0 or more."""
    task: str = ""
    """lm-eval task that the export remembers as its default evaluation; empty for none."""
    max_minutes: float = 0.0
    """Guard: stop, save and export after the optimizer step that crosses this many minutes of this start; 0: none."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """What to train on; auto takes CUDA where there is a GPU."""
    devices: int = 1
    """Processes on each node, one per GPU; 0 takes every visible GPU, on a CPU one process."""
    num_nodes: int = 1
    """Nodes, 1 or more."""
    strategy: StrategyName = "auto"
    """How the work is divided; auto is ddp on several devices, and on one there is nothing to divide."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the products; auto takes the best that the device is fast at. The optimizer's weights are float32;
    under DeepSpeed the passes use, and gradients are added up in, a bf16 copy."""
    compile: Literal["auto", "layers", "none"] = "auto"
    """Compile the layers one by one; auto does it on CUDA."""
    recompute: Recompute = "none"
    """What the backward pass works out again to save memory: none; selective, all but the outputs of matrix products
    and attention (little time; a third of the memory); full, whole layers."""
    micro_batch_size: int = 1
    """Samples that one device takes at a time, 1 or more."""
    global_batch_size: int = 256
    """Samples of an optimizer step over all devices; a multiple of micro_batch_size x devices x num_nodes."""
    log_every: int = 10
    """Optimizer steps between log entries and printed lines, 1 or more."""
    validate_every: int = 100
    """Optimizer steps between validations, 1 or more; without validation samples there are none."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints, 1 or more; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, 1 or more."""
    sample_every: int = 0
    """Optimizer steps between decoded text samples; 0 for none."""
    num_samples: int = 4
    """Prompts decoded each time, 1 or more."""
    sample_tokens: int = 128
    """Limit on new tokens of a decoded sample, 1 or more."""
    sample_trace: bool = True
    """Show how the first sample was unmasked, pass by pass, as text and as a figure in TensorBoard."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    draft: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self):
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name must be a plain folder name, got {self.name!r}.")
        for key in AT_LEAST_ONE:
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be 1 or more, got {getattr(self, key)}.")
        for key in ("seed", "max_minutes", "devices", "sample_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must be 0 or more, got {getattr(self, key)}.")
        if self.lora.rank and self.strategy not in ("auto", "ddp"):
            raise ValueError(f"lora.rank above 0 needs strategy auto or ddp, got {self.strategy}: nothing to divide.")
        self._check_adapt()
        self._check_decode()
        if self.data.sample_length % self.objective.block_size:
            raise ValueError(
                f"data.sample_length must be a multiple of objective.block_size ({self.objective.block_size}), got "
                f"{self.data.sample_length}."
            )

    def _check_decode(self) -> None:
        """Raise a ValueError for what the first text sample would refuse, in the middle of the run."""
        block_size = self.objective.block_size
        if block_size % self.decode.sub_block_size:
            raise ValueError(
                f"decode.sub_block_size must divide objective.block_size ({block_size}), got "
                f"{self.decode.sub_block_size}; try {block_size // 4}."
            )
        check_decoding(
            "ar" if self.objective.kind == "autoregressive" else "diffusion",
            self.decode,
            ReuseConfig(),
            block_size=block_size,
            num_layers=0,  # read by reuse alone
            context_attention=self.objective.context_attention,
        )

    def _check_adapt(self) -> None:
        """Raise a ValueError for what does not go with `adapt`, or would do nothing under it."""
        if self.adapt == "weights":
            for name, unused in (("adapter", AdapterSettings()), ("draft", DraftConfig())):
                if getattr(self, name) != unused:
                    raise ValueError(f"the section {name} says nothing under adapt weights; set adapt gated_lora.")
            return
        if self.strategy not in ("auto", "ddp"):
            raise ValueError(f"adapt gated_lora needs strategy auto or ddp, got {self.strategy}: nothing to divide.")
        if self.lora.rank:
            raise ValueError(f"adapt gated_lora has its rank in adapter.rank; leave lora.rank 0, got {self.lora.rank}.")
        if self.sample_every:
            raise ValueError(
                f"adapt gated_lora writes no text samples, got sample_every {self.sample_every}: verified text is the "
                "model's own whatever was learnt; train/accepted_length says how far the drafts go."
            )
        causal = ObjectiveConfig(context_attention="causal")  # which it implies
        if self.objective not in (ObjectiveConfig(), causal) or self.decode != DecodeConfig():
            name = "decode" if self.objective in (ObjectiveConfig(), causal) else "objective"
            raise ValueError(f"the section {name} says nothing under adapt gated_lora; leave it out, and see draft.")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What "auto" and the machine make of a config."""

    accelerator: str
    devices: int
    world_size: int
    strategy: StrategyName
    precision: Literal["bf16", "fp16", "fp32"]
    precision_reason: str
    accumulate: int


def learnt(config: TrainConfig) -> Objective:
    """Return the section that says what is learnt."""
    return config.draft if config.adapt == "gated_lora" else config.objective


def has_frozen_weights(config: TrainConfig) -> bool:
    """Return whether updates beside the weights are trained, and not these."""
    return config.adapt == "gated_lora" or config.lora.rank > 0


def run_folder(config: TrainConfig) -> Path:
    """Return the folder that holds everything of the run."""
    return Path(config.output_dir) / config.name


def resolve(config: TrainConfig) -> Setup:
    """Return what the config means on this machine.

    Raises:
        ValueError: the devices are not there, or the batch does not divide.
    """
    device = pick_device(config.accelerator)
    num_visible = torch.cuda.device_count() if device.type == "cuda" else 0
    devices = config.devices or num_visible or 1
    if device.type == "cuda" and devices > num_visible:
        raise ValueError(f"devices {devices} is more than the {num_visible} visible GPUs; --devices 0 takes them all.")
    world_size = devices * config.num_nodes
    micro_step = config.micro_batch_size * world_size
    if config.global_batch_size % micro_step:
        raise ValueError(
            f"global_batch_size must be a multiple of micro_batch_size x devices x num_nodes ({micro_step}), got "
            f"{config.global_batch_size}; try {max(1, config.global_batch_size // micro_step) * micro_step}."
        )
    dtype, reason = get_optimal_dtype(device)
    best = next(name for name, candidate in DTYPES.items() if candidate == dtype)
    precision = best if config.precision == "auto" else config.precision
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("precision fp16 needs a GPU: it scales the loss there; on a CPU use fp32 or bf16.")
    strategy = resolve_strategy(config.strategy, world_size)
    lightning_precision(precision, strategy)  # refuses what does not go together
    return Setup(
        accelerator=device.type,
        devices=devices,
        world_size=world_size,
        strategy=strategy,
        precision=precision,
        precision_reason=reason if config.precision == "auto" else "as configured",
        accumulate=config.global_batch_size // micro_step,
    )
