"""What happened at each denoising step of one sequence, as a plain decoder notes it when it is asked to."""

from typing import NamedTuple

from torch import Tensor


class Candidate(NamedTuple):
    """A masked place of the active sub-block at one denoising step."""

    place: int
    """From the beginning of the sequence, prompt included."""
    token: int
    """The proposal."""
    confidence: float
    """Its probability."""
    is_accepted: bool
    """Whether it was written in this step."""


Step = list[Candidate]


def note_step(offset: int, token: Tensor, confidence: Tensor, is_candidate: Tensor, is_accepted: Tensor) -> Step:
    """Return the candidates of a step over the places from `offset` on, from tensors [1, S]."""
    rows = zip(*(x[0].tolist() for x in (token, confidence, is_candidate, is_accepted)), strict=True)
    return [
        Candidate(offset + number, token, confidence, is_accepted)
        for number, (token, confidence, is_candidate, is_accepted) in enumerate(rows)
        if is_candidate
    ]
