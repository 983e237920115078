"""Will a training run fit this machine, and how long will it take? Estimates, without loading weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, get_args

from torch import nn

from fastdllm.checkpoint import empty_model
from fastdllm.demo.machine import GIB, check_disk
from fastdllm.demo.requirements import Finding
from fastdllm.runtime import device_name, peak_flops, pick_device
from fastdllm.training.config import Setup, TrainConfig, resolve
from fastdllm.training.duration import hours, measured_mfu, training_flops
from fastdllm.training.preflight import MemoryPlan
from fastdllm.training.run import check_data, check_fit, free_bytes, memory_plan
from fastdllm.training.strategies import StrategyName

BILLION = 10**9
DEVICE_COUNTS = (1, 2, 4, 8)
MEASUREMENTS = "experiments/01_training_throughput"
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Say what this machine can do and what is missing; with a training config, whether that run fits."""


def check_run(config: TrainConfig) -> list[Finding]:
    """Return findings on devices, data, memory, disk and time of a run; as far as what it needs can be found."""
    setup, finding = _tried("setup", lambda: resolve(config))
    if setup is None:
        return [finding]
    _, data = _tried("data", lambda: check_data(config, setup))
    qwen, finding = _tried("checkpoint", lambda: empty_model(config.checkpoint))
    if qwen is None:
        return [data, finding]
    plan = memory_plan(config, setup, qwen)
    _, fit = _tried("fits", lambda: check_fit(config, setup, plan))
    device, free = device_name(pick_device(setup.accelerator)), free_bytes(setup)
    return [
        Finding("setup", f"{setup.world_size} x {device}, {setup.strategy}, {setup.precision}"),
        data._replace(value=config.data.path) if not data.advice else data,
        Finding("checkpoint", f"{config.checkpoint}, {plan.num_parameters / 1e6:,.1f}M parameters"),
        *describe_memory(plan, is_compiled=plan.is_cuda and config.compile != "none"),
        fit if fit.advice else fit._replace(value=f"yes: {free / GIB:.1f} GiB free a device"),
        *compare_strategies(plan, free),
        *check_disks(config, plan),
        *describe_time(config, setup, qwen),
    ]


def _tried(subject: str, check: Callable[[], Result]) -> tuple[Result | None, Finding]:
    """Return what the check returns, None if it raises; and a finding that has its message as advice."""
    try:
        return check(), Finding(subject, "yes")
    except (ValueError, FileNotFoundError) as error:
        return None, Finding(subject, "no", str(error))


def describe_memory(plan: MemoryPlan, is_compiled: bool) -> list[Finding]:
    """Return what the estimated memory of one device is made of."""
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in plan.parts._asdict().items() if size)
    doubt = "" if is_compiled else " (too little: that is of compiled layers, these are not)"
    return [Finding("memory, estimated", f"{plan.num_bytes / GIB:.1f} GiB a device = {parts}{doubt}")]


def compare_strategies(plan: MemoryPlan, free: int) -> list[Finding]:
    """Return a line for each strategy: estimated GiB a device by number of devices, in brackets what is over `free`."""
    names = ("auto", "ddp") if plan.num_lora_parameters else get_args(StrategyName)
    lines = [Finding("GiB a device on", "".join(f"{number:>9}" for number in DEVICE_COUNTS) + " devices, estimated")]
    for name in names:
        counts = DEVICE_COUNTS[:1] if name == "auto" else DEVICE_COUNTS[1:]
        cells = ["" if number not in counts else _cell(plan, name, number, free) for number in DEVICE_COUNTS]
        lines.append(Finding(f"  {name}", "".join(f"{cell:>9}" for cell in cells).rstrip()))
    return lines


def _cell(plan: MemoryPlan, strategy: StrategyName, world_size: int, free: int) -> str:
    num_bytes = plan.changed(strategy=strategy, world_size=world_size).num_bytes
    return f"{num_bytes / GIB:.1f}" if num_bytes <= free else f"({num_bytes / GIB:.1f})"


def check_disks(config: TrainConfig, plan: MemoryPlan) -> list[Finding]:
    """Return findings on the disk that checkpoints and the export take, and prepared data would."""
    needed = plan.disk_bytes(config.keep_checkpoints)
    found = check_disk(config.output_dir, needed)
    each = plan.checkpoint_bytes / GIB
    value = f"{needed / GIB:.1f} GiB = {config.keep_checkpoints + 1} x {each:.1f} + export; {found.value}"
    return [Finding("run folder, estimated", value, found.advice), check_disk(config.data.cache_dir)]


def describe_time(config: TrainConfig, setup: Setup, qwen: nn.Module) -> list[Finding]:
    """Return the estimated hours of the run and of 1B tokens, or why there is no estimate."""
    device = pick_device(setup.accelerator)
    peak = peak_flops(device)
    if device.type != "cuda":
        return [Finding("time", "not estimated: nothing was measured on a CPU")]
    if peak is None:
        return [Finding("time", f"not estimated: the peak of {device_name(device)} is not in runtime.DENSE_BF16_PEAKS")]
    if config.adapt == "gated_lora":
        return [Finding("time", "not estimated: adapters that draft were not measured")]
    if setup.precision != "bf16" or config.compile == "none":
        return [Finding("time", "not estimated: measured was bf16 with compiled layers alone")]
    mfu = measured_mfu(sum(parameter.numel() for parameter in qwen.parameters()))
    flops = training_flops(config, qwen)
    samples = config.max_steps * config.global_batch_size

    def estimate(num_samples: float) -> str:
        return _duration(hours(num_samples, flops, peak, mfu, setup.world_size))

    places = config.data.sample_length
    return [
        Finding("time, estimated", f"{estimate(samples)} for {config.max_steps:,} steps, checks and samples left out"),
        Finding(
            "  1B tokens", f"{estimate(BILLION / places)} at {places} tokens a sample; less where rows are dropped"
        ),
        Finding("  assumed", f"{mfu:.1%} of {peak / 1e12:.0f} TFLOP/s on each device, as on one H100: {MEASUREMENTS}"),
    ]


def _duration(number: float) -> str:
    return f"{number:.1f} hours" if number < 48 else f"{math.ceil(number / 24)} days"
