"""What a run needs, checked before any weights are loaded: data, source model and memory."""

import math
from dataclasses import dataclass, replace

from fastdllm.model import Recompute
from fastdllm.training.strategies import StrategyName

GIB = 2**30
# Bytes per parameter: weights, gradients, and what AdamW keeps (two running means; DeepSpeed in half precision also the
# float32 weights). Autocast keeps half-precision copies of the weights during a pass: two more on the weights' side.
MIXED_BYTES = {"auto": (6, 4, 8), "ddp": (6, 4, 8), "deepspeed": (2, 2, 12), "fsdp2": (4, 4, 8)}
FLOAT32_BYTES = {"auto": (4, 4, 8), "ddp": (4, 4, 8), "deepspeed": (4, 4, 12), "fsdp2": (4, 4, 8)}
# Which of the three are divided among the processes.
SHARDED_PARTS = {
    "deepspeed_stage_1": (False, False, True),
    "deepspeed_stage_2": (False, True, True),
    "deepspeed_stage_3": (True, True, True),
    "fsdp2": (True, True, True),
}
# Values kept for the backward pass per row, as a multiple of sqrt(parameters), by what is recomputed. Measured on one
# H100 at 0.5B and 1.5B: 22 and 24 without, 13 and 14.5 selectively; "full" keeps a width per layer and one layer.
KEPT_VALUES_PER_ROW = {"none": 24, "selective": 14.5, "full": 4}
CUDA_OVERHEAD_BYTES = 4 * GIB  # context, kernels, and a part of the logits


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What decides the memory of one process."""

    num_parameters: int
    strategy: StrategyName
    is_half_precision: bool
    world_size: int
    micro_batch_size: int
    rows_per_sample: int
    is_cuda: bool
    recompute: Recompute = "none"
    num_lora_parameters: int = 0
    """Values trained beside frozen weights; 0: all weights are trained."""
    kept_of_context: int = 0
    """Values kept of a sample's rows that have no gradient."""

    @property
    def num_bytes(self) -> int:
        """An estimate of the peak, good to about 15 % for Qwen2.5 shapes."""
        table = MIXED_BYTES if self.is_half_precision else FLOAT32_BYTES
        parts = table["deepspeed" if self.strategy.startswith("deepspeed") else self.strategy]
        sharded = SHARDED_PARTS.get(self.strategy, (False, False, False))
        states = sum(part / (self.world_size if cut else 1) for part, cut in zip(parts, sharded, strict=True))
        per_row = KEPT_VALUES_PER_ROW[self.recompute] * math.sqrt(self.num_parameters)
        values = (per_row * self.rows_per_sample + self.kept_of_context) * self.micro_batch_size
        overhead = CUDA_OVERHEAD_BYTES if self.is_cuda else 0
        value_bytes = 2 if self.is_half_precision else 4
        weights = states * self.num_parameters
        if self.num_lora_parameters:  # frozen weights need neither gradients nor an optimizer
            weights = value_bytes * self.num_parameters + states * self.num_lora_parameters
        return int(weights + values * value_bytes + overhead)

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
