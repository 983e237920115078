"""What a training pass gives, and its sums for the log."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    num_rows: int
    """Rows through the layers, over all samples."""
    operations: int | Tensor
    """Floating-point operations of the pass and its backward pass."""
    num_empty_rows: Tensor
    """int64 []: rows computed that hold nothing, at the ends of samples; rows of windows that predict nothing."""


class Meter:
    """Sums of loss, correct predictions and targets by noise level over some batches, on the device in float64.

    A clean row that predicts its next token for both reasons (first_token clean, ar_loss_weight) counts by noise level.
    """

    num_bins = NUM_NOISE_BINS + 1

    def __init__(self, device: torch.device, num_steps: int = 1):
        self.num_steps = torch.tensor(num_steps, device=device)  # whose losses `objective` adds up
        self.sums = torch.zeros(3 * self.num_bins + 2, dtype=torch.float64, device=device)
        self.bins = self.sums[:-2].view(-1, 3)  # loss, correct, targets
        self.objective, self.num_tokens = self.sums[-2:]

    def add(self, scores: Scores, objective: Tensor, num_tokens: Tensor) -> None:
        """Count a micro-batch; `objective` [] is its part of the step's loss, before any scaling for averages."""
        member = nn.functional.one_hot(self._bin_of(scores), self.num_bins).double()  # [M, bins]; products keep order
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
        return ({"loss": objective / num_steps} if num_steps else {}) | self._values(bins, num_tokens)

    def _bin_of(self, scores: Scores) -> Tensor:
        level = scores.targets.noise_level
        index = (level.nan_to_num(0.0) * NUM_NOISE_BINS).long().clamp(max=NUM_NOISE_BINS - 1)
        return torch.where(level.isnan(), NEXT_TOKEN_BIN, index)

    def _values(self, bins: list[list[float]], num_tokens: float) -> dict[str, float]:
        noised, values = [sum(column) for column in zip(*bins[:NUM_NOISE_BINS], strict=True)], {}
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


class DraftMeter(Meter):
    """The same by row of the window, and how many drafts of a window would be accepted: those before the first wrong
    one, where the text is the model's own greedy one."""

    def __init__(self, device: torch.device, num_steps: int = 1, *, window: int):
        self.window, self.num_bins = window, window + 1  # the last bin: accepted, -, windows
        super().__init__(device, num_steps)

    def add(self, scores: Scores, objective: Tensor, num_tokens: Tensor) -> None:
        super().add(scores, objective, num_tokens)
        is_predicted = (scores.targets.weight > 0).view(-1, self.window)
        is_accepted = (scores.is_correct.view(-1, self.window) & is_predicted).long().cumprod(1)
        self.bins[self.window, 0] += is_accepted.sum()
        self.bins[self.window, 2] += is_predicted[:, 0].sum()

    def _bin_of(self, scores: Scores) -> Tensor:
        return torch.arange(len(scores.loss), device=scores.loss.device) % self.window

    def _values(self, bins: list[list[float]], num_tokens: float) -> dict[str, float]:
        *rows, (accepted, _, num_windows) = bins
        if not num_windows:
            return {}
        _, correct, count = (sum(column) for column in zip(*rows, strict=True))
        values = {"masked_accuracy": correct / count, "accepted_length": accepted / num_windows}
        for number, (loss, correct, count) in enumerate(rows, start=1):
            if count:
                values |= {f"loss_by_row/{number:02}": loss / count, f"accuracy_by_row/{number:02}": correct / count}
        return values


def add_over_processes(values: Tensor) -> Tensor:
    """Return the element-wise sum over all processes; with one process, `values`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total
