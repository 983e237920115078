"""A replayed acceptance trace: how many tokens each denoising step reveals, whatever the model is sure of.

With it, engines are compared at equal tokens per forward on random weights. Tokens appear from left to right inside
their sub-block, so that a full pass comes once for each sub-block, as it nearly does with adapted models. Of verifying
passes the number of accepted drafts is replayed.
"""

import json
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from fastdllm.decoding.policies import Fixed, Proposals
from fastdllm.decoding.state import SlotNumbers
from fastdllm.decoding.steps import Steps
from fastdllm.decoding.verify import VerifySteps

DRAWN = 997  # passes until what is accepted repeats; prime, so that it meets no period of the engine's


class InOrder(Fixed):
    """The fixed policy with the work that it does, and earlier places taken for surer ones."""

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        confidence = _falling(proposals.confidence)
        return super().accept(proposals._replace(confidence=confidence), is_candidate, parameter)


def replaying(trace: list[int]) -> type[Steps]:
    """Return Steps whose n-th denoising step of any slot reveals trace[n % len(trace)] tokens."""

    class ReplayedSteps(Steps):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.policy = InOrder()
            self.trace = torch.tensor(trace, dtype=torch.float32, device=self.model.device)

        def _parameter(self, slots: Tensor, at: SlotNumbers) -> Tensor:
            return self.trace[(at.denoise_passes - 1) % len(trace)]  # this step is counted already

    return ReplayedSteps


def accepting(trace: list[int]) -> type[VerifySteps]:
    """Return VerifySteps whose n-th pass of a request accepts trace[(n + 31 * seed) % len(trace)] drafts, as far as it
    has so many."""

    class ReplayedVerify(VerifySteps):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.trace = torch.tensor(trace, device=self.model.device)

        def _num_accepted(self, at: SlotNumbers, is_right: Tensor, num_drafts: Tensor) -> Tensor:
            super()._num_accepted(at, is_right, num_drafts)  # the work that it does
            return self.trace[(at.denoise_passes + 31 * at.seed) % len(trace)].minimum(num_drafts)

    return ReplayedVerify


def draw_accepted(rate: float, file: str) -> list[int]:
    """Return numbers of accepted drafts to replay, the same in every process.

    Args:
        rate: each draft behind right ones is right with this chance.
        file: a row of lossless.py, whose `accepted_counts` take the rate's place; empty: none.
    Raises:
        ValueError: a rate out of range, or a file that says nothing of accepted drafts.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"acceptance must be in [0, 1), got {rate}; try 0.8.")
    counts = json.loads(Path(file).read_text()).get("accepted_counts") if file else None
    if file and not sum(counts or []):
        raise ValueError(f"{file} has no accepted_counts; give an acceptance row of benchmarks/lossless.py.")
    generator = torch.Generator().manual_seed(0)
    if counts:
        return torch.multinomial(torch.tensor(counts).double(), DRAWN, replacement=True, generator=generator).tolist()
    uniform = torch.rand(DRAWN, generator=generator, dtype=torch.float64).clamp(min=1e-9)
    return [0] * DRAWN if rate == 0 else (uniform.log() / torch.tensor(rate).log()).floor().long().tolist()


class ReplayedThreshold:
    """A threshold for the published code: `confidence > threshold` is then true where the trace says.

    All rows of a batch are at the same step. Places that are no candidates have confidence -inf, and the code accepts
    the most confident one besides, so the confidences are made to fall from left to right.
    """

    def __init__(self, trace: list[int]):
        self._counts = cycle(trace)
        self.num_steps = 0

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function not in (Tensor.__gt__, Tensor.gt, torch.gt) or not isinstance(arguments[1], cls):
            return NotImplemented
        confidence, threshold = arguments
        is_candidate = ~confidence.isneginf()  # [B, S]
        confidence.copy_(torch.where(is_candidate, _falling(confidence), confidence))
        threshold.num_steps += 1
        return is_candidate & (is_candidate.cumsum(-1) <= next(threshold._counts))


def _falling(confidence: Tensor) -> Tensor:
    place = torch.arange(confidence.shape[-1], dtype=confidence.dtype, device=confidence.device)
    return -place.expand_as(confidence)


def check_trace(trace: list[int], block_size: int, sub_block_size: int) -> None:
    """Raise ValueError unless the trace fills one block, sub-block by sub-block; its first token comes from an append.

    A step reveals tokens of one sub-block only, so any other trace would not be what is replayed.
    """
    ends = set(range(sub_block_size - 1, block_size, sub_block_size))
    sums = [sum(trace[: index + 1]) for index in range(len(trace))]
    if min(trace, default=0) < 1 or not ends <= set(sums) or sums[-1] != block_size - 1:
        raise ValueError(
            f"trace must hold whole numbers above 0 that sum up to {sorted(ends)} on the way, so that no step crosses "
            f"a sub-block's end, got {trace}, whose sums are {sums}."
        )
