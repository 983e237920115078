"""What does the loss cost, from hidden states to gradients, and how exact is it? One line for each way to compute it.

    python benchmarks/loss_head.py [--rows 8192]

Ways: `plain` (all logits, float32 cross-entropy), `recomputed` (in parts, each worked out again in the backward
pass), `ours` (objective.token_losses), `liger` (Liger's fused linear cross-entropy), `torch` (F.linear_cross_entropy,
from torch 2.13 on). Weights are float32, hidden states bfloat16, as in training. Memory is the peak above what the
inputs and the head's gradient take; the bfloat16 copy of the head is in it. The error is the largest of the hidden
states' gradient against float64, on 64 rows, by its maximum.
"""

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdllm.cli import run
from fastdllm.objective import token_losses
from fastdllm.runtime import device_name, pick_device


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Measure the LM head's loss."""

    rows: int = 8192
    """Rows that are scored."""
    width: int = 1536
    """Of the hidden states."""
    vocabulary: int = 151936
    """Entries of the head."""
    repeats: int = 5
    """Timed passes, the median counts."""


def plain(hidden, head, token, weight):
    loss = F.cross_entropy(F.linear(hidden, head.to(hidden.dtype)).float(), token, reduction="none")
    return (loss * weight).sum()


def recomputed(hidden, head, token, weight):
    head = head.to(hidden.dtype)
    parts = zip(hidden.split(1024), token.split(1024), weight.split(1024), strict=True)
    return sum(checkpoint(plain, part, head, t, w, use_reentrant=False) for part, t, w in parts)


def ours(hidden, head, token, weight):
    return token_losses(hidden, head, token, weight)[0]


def liger(hidden, head, token, weight):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, head.to(hidden.dtype), token, reduction="sum", accum_dtype=torch.float32
    )


def from_torch(hidden, head, token, weight):
    loss = F.linear_cross_entropy(hidden, head.to(hidden.dtype), token, reduction="none")
    return (loss.float() * weight).sum()


WAYS = {"plain": plain, "recomputed": recomputed, "ours": ours, "liger": liger, "torch": from_torch}


def measure(config: LossConfig) -> None:
    """Print one line for each way; one that is not installed, or does not fit, says so."""
    device = pick_device()
    print(device_name(device), torch.__version__, config)
    for name, way in WAYS.items():
        try:
            print(f"{name:<11}", _measure(way, config, device), flush=True)
        except (ImportError, AttributeError, torch.OutOfMemoryError) as error:
            print(f"{name:<11} not measured: {type(error).__name__}: {str(error)[:100]}", flush=True)


def _inputs(rows: int, config: LossConfig, device):
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, config.width, generator=generator, device=device).to(torch.bfloat16)
    head = 0.02 * torch.randn(config.vocabulary, config.width, generator=generator, device=device)
    token = torch.randint(0, config.vocabulary, (rows,), generator=generator, device=device)
    return hidden.requires_grad_(), head.requires_grad_(), token, torch.ones(rows, device=device)


def _measure(way, config: LossConfig, device) -> str:
    hidden, head, token, weight = _inputs(config.rows, config, device)
    seconds, is_cuda = [], device.type == "cuda"
    for _ in range(config.repeats + 2):
        hidden.grad = head.grad = None
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        way(hidden, head, token, weight).backward()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    extra = torch.cuda.max_memory_allocated() - before - head.numel() * 4 - hidden.numel() * 2 if is_cuda else 0
    median = sorted(seconds[2:])[config.repeats // 2]
    flops = 6 * config.rows * config.width * config.vocabulary
    speed = f"{1e3 * median:8.1f} ms  {flops / median / 1e12:6.0f} TFLOP/s"
    return f"{speed}  {extra / 2**30:6.2f} GiB extra  error {_error(way, config, device):.1e}"


def _error(way, config: LossConfig, device) -> float:
    hidden, head, token, weight = _inputs(64, config, device)
    way(hidden, head, token, weight).backward()
    exact = hidden.detach().double().requires_grad_()
    plain_loss = F.cross_entropy(exact @ head.detach().bfloat16().double().T, token, reduction="sum")
    plain_loss.backward()
    return float((hidden.grad.double() - exact.grad).abs().max() / exact.grad.abs().max())


if __name__ == "__main__":
    run(LossConfig, measure)
