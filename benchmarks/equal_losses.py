"""Does training without dead rows learn what the published layout learns? The losses of both, step by step.

    python benchmarks/equal_losses.py [--steps 200] [--checkpoint data/tiny --data_path data/tiny-source/train.jsonl]

Two copies of a model train on the same packed samples with the same noise, in float32: one in the published layout (two
rows of 2L, all logits), one with one shared clean half, dead rows left out and the last layer run where a label is
predicted. Prints the losses and how far they are apart.
"""

import copy
from dataclasses import dataclass

import torch
from published_layout import PublishedPass  # beside this file
from torch.utils.data import DataLoader

from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import run
from fastdllm.data.datamodule import AdaptDataModule, BatchPlan, DataConfig, StepSampler, TrainingSamples
from fastdllm.objective import ObjectiveConfig
from fastdllm.runtime import device_name, pick_device
from fastdllm.training.module import TrainingPass


@dataclass(frozen=True, kw_only=True)
class EqualConfig:
    """Train in both layouts and compare."""

    steps: int = 200
    """Optimizer steps."""
    checkpoint: str = "data/tiny"
    """Model to start from."""
    data_path: str = "data/tiny-source/train.jsonl"
    """Training data (python data/word_problems/problems.py writes these)."""
    sample_length: int = 256
    """Tokens of the longest document."""
    batch_size: int = 4
    """Samples of an optimizer step."""
    learning_rate: float = 1e-3
    """Constant."""


def compare(config: EqualConfig) -> None:
    """Train both and print their losses."""
    device, objective = pick_device(), ObjectiveConfig()
    source = load_checkpoint(config.checkpoint)
    data = AdaptDataModule(
        DataConfig(path=config.data_path, sample_length=config.sample_length, limit=10_000),
        source.tokenizer,
        mask_token_id=source.mask_token_id,
        objective=objective,
        seed=0,
        micro_batch_size=config.batch_size,
    )
    data.prepare_data()
    model = source.model().to(device)
    passes = [
        TrainingPass(copy.deepcopy(model).train(), objective, config.sample_length),
        PublishedPass(model.train(), objective, config.sample_length, is_plain=True),
    ]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=config.learning_rate, betas=(0.9, 0.95)) for each in passes]
    print(f"{device_name(device)}, float32; {data.training.packing.fill:.1%} of the rows kept are needed")
    sampler = StepSampler(BatchPlan(config.batch_size, 1, 1, 0), 0, config.steps)
    loader = DataLoader(TrainingSamples(data.training, 0, config.batch_size), batch_sampler=sampler)
    largest = 0.0
    for step, batch in enumerate(loader, start=1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        losses = [_train(*pair, batch) for pair in zip(passes, optimizers, strict=True)]
        apart = abs(losses[0] - losses[1]) / losses[1]
        largest = max(largest, apart)
        if step == 1 or step % 20 == 0:
            print(f"step {step:>4}  ours {losses[0]:.7f}  published {losses[1]:.7f}  apart {apart:.1e}", flush=True)
    print(f"largest relative difference over {config.steps} optimizer steps: {largest:.1e}")


def _train(scoring: TrainingPass, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    loss = scoring(batch).total / batch["step_targets"][0]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(scoring.parameters(), 1.0)
    optimizer.step()
    return float(loss)


if __name__ == "__main__":
    run(EqualConfig, compare)
