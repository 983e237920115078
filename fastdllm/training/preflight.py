"""What a run needs, checked before any weights are loaded: data, source model, memory and disk."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastdllm.model import Recompute
from fastdllm.objective import LOGITS_PER_PART
from fastdllm.training.strategies import StrategyName

GIB = 2**30
# Bytes per parameter: weights, gradients, and what AdamW keeps (two running means; DeepSpeed in half precision also the
# float32 weights). ddp with several micro-batches a step took 4 bytes more than one GPU (66.4 and 60.2 GB at 1.5B):
# gradients of earlier micro-batches seem to stand beside the buckets that they go into.
# Half-precision copies of the weights are made anew by each product, so they are not there at the peak.
MIXED_BYTES = {"auto": (4, 4, 8), "ddp": (4, 8, 8), "deepspeed": (2, 2, 12), "fsdp2": (4, 4, 8)}
FLOAT32_BYTES = {"auto": (4, 4, 8), "ddp": (4, 8, 8), "deepspeed": (4, 4, 12), "fsdp2": (4, 4, 8)}
# Which of the three are divided among the processes.
SHARDED_PARTS = {
    "deepspeed_stage_1": (False, False, True),
    "deepspeed_stage_2": (False, True, True),
    "deepspeed_stage_3": (True, True, True),
    "fsdp2": (True, True, True),
}
CUDA_RESERVE_BYTES = 2 * GIB  # context, kernels, and what the allocator has but cannot use; in no measured peak
EXPORT_BYTES = 2  # per parameter: bfloat16


class ModelShape(NamedTuple):
    """The sizes of a Qwen2 that memory follows from."""

    num_parameters: int
    """A tied embedding counts once."""
    num_layers: int
    width: int
    """C."""
    query_width: int
    """H * E."""
    key_width: int
    """G * E."""
    inner_width: int
    """Of the MLP."""
    vocab_size: int


class MemoryParts(NamedTuple):
    """Bytes of one process at the end of a forward pass, which is where the peak is."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass (`kept_values`)."""
    head: int
    """LM head: its float32 gradient and its half-precision copy, where there are, and a part of the logits."""
    reserve: int
    """What CUDA takes beside tensors."""


def kept_values(shape: ModelShape, recompute: Recompute, num_rows: int, num_targets: int) -> int:
    """Return how many values compiled layers keep for the backward pass of one sample.

    With C, Q, K, F for the widths of rows, queries, keys and MLP, a layer keeps for each row:

        none       4C + 4Q + 3F   its input and the sum behind attention, both also normed; queries, keys and values
                                  (these two repeated for every query head), attention's output; gate, up, product
        selective  2C + 2Q + 2K + 2F   its input, and the outputs of products and attention: query, key, value,
                                  attended, projected, gate and up; of `down` only what is the next layer's input
        full       C              its input; and in its turn one layer all of `none`, with as many gradients

    The last layer keeps what lies behind its keys and values for the rows that predict something alone. Uncompiled
    layers keep about a quarter more.

    Args:
        num_rows: rows of the sample through the layers; num_targets: of those, rows that predict something.
    """
    C, Q, K, F = shape.width, shape.query_width, shape.key_width, shape.inner_width
    for_all, for_targets = {  # up to keys and values; behind them
        "none": (2 * C + 2 * Q, 2 * C + 2 * Q + 3 * F),
        "selective": (C + 2 * K, C + 2 * Q + 2 * F),
        "full": (C, 0),
    }[recompute]
    kept = shape.num_layers * num_rows * for_all + ((shape.num_layers - 1) * num_rows + num_targets) * for_targets
    recomputed = 2 * num_rows * (4 * C + 4 * Q + 3 * F) if recompute == "full" else 0
    return kept + recomputed


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What decides the memory of one process."""

    shape: ModelShape
    strategy: StrategyName
    is_half_precision: bool
    world_size: int
    micro_batch_size: int
    rows_per_sample: int
    targets_per_sample: int
    """Rows of a sample that predict something."""
    is_cuda: bool
    recompute: Recompute = "none"
    num_lora_parameters: int = 0
    """Values trained beside frozen weights; 0: all weights are trained."""
    kept_of_context: int = 0
    """Values kept of a sample's rows that have no gradient."""

    @property
    def num_parameters(self) -> int:
        return self.shape.num_parameters

    @property
    def parts(self) -> MemoryParts:
        """An estimate; without the reserve within 5 % of the peaks measured (0.5B and 1.5B, one and two H100s)."""
        table = MIXED_BYTES if self.is_half_precision else FLOAT32_BYTES
        each = table["deepspeed" if self.strategy.startswith("deepspeed") else self.strategy]
        sharded = SHARDED_PARTS.get(self.strategy, (False, False, False))
        states = [part / (self.world_size if cut else 1) for part, cut in zip(each, sharded, strict=True)]
        trained = self.num_lora_parameters or self.num_parameters
        weights, gradients, optimizer = (int(part * trained) for part in states)
        if self.num_lora_parameters:  # frozen weights need neither gradients nor an optimizer
            weights += self._value_bytes * self.num_parameters
        values = kept_values(self.shape, self.recompute, self.rows_per_sample, self.targets_per_sample)
        values += self.kept_of_context
        activations = self._value_bytes * self.micro_batch_size * values
        return MemoryParts(
            weights, gradients, optimizer, activations, self._head_bytes, CUDA_RESERVE_BYTES if self.is_cuda else 0
        )

    @property
    def _value_bytes(self) -> int:
        return 2 if self.is_half_precision else 4

    @property
    def _head_bytes(self) -> int:
        matrix = self.shape.vocab_size * self.shape.width
        is_copied = self.is_half_precision and not self.num_lora_parameters and not self.strategy.startswith("deep")
        logits = min(self.micro_batch_size * self.targets_per_sample * self.shape.vocab_size, LOGITS_PER_PART)
        gradient = 0 if self.num_lora_parameters else 4
        return matrix * (gradient + 2 * is_copied) + self._value_bytes * logits

    @property
    def num_bytes(self) -> int:
        """An estimate of the peak of one process."""
        return sum(self.parts)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk, of all processes: float32 weights and AdamW's means; of DeepSpeed also the
        weights that it computes with. Frozen weights are in none."""
        own = self._value_bytes if self.strategy.startswith("deepspeed") else 0
        return (12 + own) * (self.num_lora_parameters or self.num_parameters)

    def disk_bytes(self, keep_checkpoints: int) -> int:
        """Return what the run folder comes to: the checkpoints kept, one more being written, and the export."""
        return (keep_checkpoints + 1) * self.checkpoint_bytes + EXPORT_BYTES * self.num_parameters

    def changed(self, **changes) -> "MemoryPlan":
        """Return the plan with other values."""
        return replace(self, **changes)


def check_memory(plan: MemoryPlan, free_bytes: int, device: str) -> None:
    """Raise a ValueError that says what would fit, if `plan` does not fit into the free memory of one process."""
    if plan.num_bytes <= free_bytes:
        return
    fitting = _what_fits(plan, free_bytes)
    raise ValueError(
        f"Training {plan.num_parameters / 1e9:.2f}B parameters with strategy {plan.strategy} on {plan.world_size} "
        f"device(s) at micro_batch_size {plan.micro_batch_size} needs about {plan.num_bytes / GIB:.1f} GiB a device, "
        f"and {device} has {free_bytes / GIB:.1f} GiB free. "
        + (f"This would fit: {fitting}." if fitting else "Nothing tried would fit: use a smaller model.")
    )


def check_host_memory(weight_bytes: int, num_processes: int, free_bytes: int) -> None:
    """Raise a ValueError if the processes of a machine cannot all hold the weights that each of them reads."""
    needed = weight_bytes * num_processes
    if needed > free_bytes:
        raise ValueError(
            f"Each of the {num_processes} processes here reads {weight_bytes / GIB:.1f} GiB of weights into main "
            f"memory: {needed / GIB:.0f} GiB in all, and {free_bytes / GIB:.0f} GiB are free. Use at most "
            f"{free_bytes // weight_bytes} devices on a machine, or one with more memory."
        )


def _what_fits(plan: MemoryPlan, free_bytes: int) -> str:
    """Return flags for the smallest change that fits, or "": smaller micro-batches and selective recomputation, then
    more sharding and devices."""
    sizes = [2**power for power in range(int(math.log2(plan.micro_batch_size)), -1, -1)]
    for recompute in dict.fromkeys((plan.recompute, "selective")):
        for size in sizes:
            if plan.changed(micro_batch_size=size, recompute=recompute).num_bytes <= free_bytes:
                flag = "" if recompute == plan.recompute else "--recompute selective "
                return f"{flag}--micro_batch_size {size}"
    if plan.num_lora_parameters:  # frozen weights are never divided
        return ""
    for world_size in (plan.world_size, 2, 4, 8, 16, 32, 64):
        for strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
            for size in sizes:
                candidate = plan.changed(world_size=world_size, strategy=strategy, micro_batch_size=size)
                if world_size >= max(2, plan.world_size) and candidate.num_bytes <= free_bytes:
                    return f"--strategy {strategy} --micro_batch_size {size} on {world_size} devices"
    return ""
