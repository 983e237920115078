"""What a training pass gives, and its sums for the log."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdllm.model import PassSize
from fastdllm.objective import Targets

NUM_NOISE_BINS = 10
NEXT_TOKEN_BIN = NUM_NOISE_BINS  # targets of the autoregressive loss have no noise level


class Scores(NamedTuple):
    """What a training pass gives: M rows that predict something, filled up with ones of weight 0, and their cost."""

    total: Tensor
    """float32 []: the losses times their weights, summed; what has a gradient."""
    loss: Tensor
    """[M] float32, in nats."""
    is_correct: Tensor
    """[M] bool."""
    targets: Targets
    """Each [M]."""
    size: PassSize
    num_empty_rows: Tensor
    """int64 []: rows computed that hold nothing, at the ends of samples."""


class Meter:
    """Sums of loss, correct predictions and targets by noise level over some batches, on the device in float64.

    A clean row that predicts its next token for both reasons (first_token clean, ar_loss_weight) counts by noise level.
    """

    def __init__(self, device: torch.device, num_steps: int = 1):
        self.num_steps = torch.tensor(num_steps, device=device)  # whose losses `objective` adds up
        self.sums = torch.zeros(3 * (NUM_NOISE_BINS + 1) + 2, dtype=torch.float64, device=device)
        self.bins = self.sums[:-2].view(-1, 3)  # loss, correct, targets
        self.objective, self.num_tokens = self.sums[-2:]

    def add(self, scores: Scores, objective: Tensor, num_tokens: Tensor) -> None:
        """Count a micro-batch; `objective` [] is its part of the step's loss, before any scaling for averages."""
        level = scores.targets.noise_level
        index = (level.nan_to_num(0.0) * NUM_NOISE_BINS).long().clamp(max=NUM_NOISE_BINS - 1)
        index = torch.where(level.isnan(), NEXT_TOKEN_BIN, index)
        member = nn.functional.one_hot(index, NUM_NOISE_BINS + 1).double()  # [M, bins]; a product has a fixed order
        member *= (scores.targets.weight > 0)[:, None]
        values = torch.stack([scores.loss.detach(), scores.is_correct, torch.ones_like(scores.loss)], dim=1).double()
        self.bins += member.T @ values
        self.objective += objective.detach()
        self.num_tokens += num_tokens.sum()

    def add_step(self, step: "Meter", is_skipped: Tensor) -> None:
        """Count what another meter counted in one optimizer step, unless `is_skipped`, bool []."""
        self.num_steps += ~is_skipped
        self.sums += torch.where(is_skipped, 0.0, step.sums)  # not a product: the sums may hold NaN

    def read(self) -> dict[str, float]:
        """Return means over the steps and all processes, which must all call this; what is empty is left out."""
        *flat, objective, num_tokens = add_over_processes(self.sums).tolist()
        num_steps = int(self.num_steps)
        bins = [flat[start : start + 3] for start in range(0, len(flat), 3)]
        noised = [sum(column) for column in zip(*bins[:NUM_NOISE_BINS], strict=True)]
        values = {"loss": objective / num_steps} if num_steps else {}
        if noised[2]:
            values |= {"masked_accuracy": noised[1] / noised[2], "masked_fraction": noised[2] / (2 * num_tokens)}
        if bins[NEXT_TOKEN_BIN][2]:
            loss, correct, count = bins[NEXT_TOKEN_BIN]
            values |= {"next_token_loss": loss / count, "next_token_accuracy": correct / count}
        for number, (loss, correct, count) in enumerate(bins[:NUM_NOISE_BINS]):
            if count:
                name = f"{number / NUM_NOISE_BINS:.1f}-{(number + 1) / NUM_NOISE_BINS:.1f}"
                values |= {f"loss_by_noise/{name}": loss / count, f"accuracy_by_noise/{name}": correct / count}
        return values


def add_over_processes(values: Tensor) -> Tensor:
    """Return the element-wise sum over all processes; with one process, `values`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total
