"""How long a run will take, from its operations and the share of a GPU's peak that training was measured to reach."""

import math

import torch
from torch import nn

from fastdllm.masks import Rows, clean_rows, count_attention_pairs, training_rows
from fastdllm.model import PassSize, forward_flops
from fastdllm.training.config import TrainConfig
from fastdllm.training.module import BACKWARD_AND_FORWARD, FROZEN_BACKWARD_AND_FORWARD

# Share of the dense bfloat16 peak that layout `shared` reached on one H100, by parameters:
# experiments/01_training_throughput/rows/qwen2.5-0.5b-shared.json and qwen2.5-1.5b-shared.json.
MEASURED_MFU = {494_032_768: 0.377, 1_543_714_304: 0.460}


def measured_mfu(num_parameters: int) -> float:
    """Return the share of the peak measured with the model nearest in size, by ratio."""
    return MEASURED_MFU[min(MEASURED_MFU, key=lambda size: abs(math.log(size / num_parameters)))]


def sample_flops(config: TrainConfig, qwen: nn.Module) -> int:
    """Return the floating-point operations of one sample's forward pass, one document as long as a sample.

    With shorter documents there are fewer pairs in attention. `qwen` is a Qwen2ForCausalLM, which may have no storage.
    """
    objective, length = config.objective, config.data.sample_length
    sample = objective.sample_shape(length)
    is_autoregressive = objective.kind == "autoregressive"
    position = torch.arange(length)[None]
    rows = (clean_rows if is_autoregressive else training_rows)(torch.ones_like(position), position)
    # with complementary views each token is predicted once, in either: the first view's rows stand for those
    chosen = Rows(*(tensor[:, : sample.num_targets] for tensor in rows))
    context = "causal" if is_autoregressive else objective.context_attention
    pairs, last_pairs = (
        int(count_attention_pairs(some, objective.block_size, context).sum()) for some in (rows, chosen)
    )
    size = PassSize(sample.num_rows, sample.num_targets, pairs, last_pairs, sample.num_targets)
    return int(forward_flops(qwen.config, size))


def training_flops(config: TrainConfig, qwen: nn.Module) -> int:
    """Return the operations of one sample in training: both passes, and again the forward one if all is recomputed.

    Selective recomputation is in the measured share of the peak.
    """
    passes = FROZEN_BACKWARD_AND_FORWARD if config.lora.rank else BACKWARD_AND_FORWARD
    return (passes + (config.recompute == "full")) * sample_flops(config, qwen)


def hours(num_samples: float, flops_per_sample: int, peak: float, mfu: float, num_devices: int) -> float:
    """Return the hours of `num_samples` on devices of `peak` FLOP/s each, of which they reach the share `mfu`."""
    return num_samples * flops_per_sample / (peak * mfu * num_devices) / 3600
