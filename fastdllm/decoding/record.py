"""A trace of the engine's own passes: what each of them wrote, instead of what else, and when it ended.

The request is decoded by one engine that only looks at the clock, and by one that only looks at the passes; both make
the same passes, so the seconds are those of an engine that nothing disturbs. An engine that is not traced is unchanged.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdllm.decoding.engine import Engine
from fastdllm.decoding.policies import Proposals
from fastdllm.decoding.rows import Completion, Request, Row
from fastdllm.decoding.state import COUNTERS, Phase, SlotNumbers
from fastdllm.decoding.steps import Steps
from fastdllm.decoding.trace import Choice, TraceStep, Unmasked
from fastdllm.decoding.verify import VerifySteps
from fastdllm.model import BlockDiffusionLM

NUM_ALTERNATIVES = 4
DIGITS = 6  # of probabilities and seconds, behind the point
KIND_OF = {
    Phase.PREFILL: "prefill",
    Phase.APPEND: "append",
    Phase.FULL: "full",
    Phase.SUB_BLOCK: "sub_block",
    Phase.REUSE: "reuse",
    Phase.TOKEN: "token",
    Phase.REFRESH: "sub_block",
    Phase.REUSE_REST: "reuse",
    Phase.VERIFY: "verify",
}  # a probe is the beginning of the step that follows it


def record(
    model: BlockDiffusionLM, tokenizer: PreTrainedTokenizerBase, request: Request, **options: Any
) -> tuple[Completion, list[TraceStep], str]:
    """Decode a request alone; return its answer, the steps that led to it, and how they were timed (trace.TIMINGS).

    Args:
        options: mode, decode and reuse, as an engine takes them.
    """
    timed = _TimedEngine(model, tokenizer, batch_size=1, **options)
    list(timed.run([request]))  # a warm-up, with whatever graphs are to be recorded
    completion, ends = timed.time(request)
    recording = _RecordingEngine(
        model,
        tokenizer,
        batch_size=1,
        free_rows=timed.free_rows,
        is_fused=timed.is_fused,
        is_graphed=False,
        **options,
    )
    timed.free()
    recorded, own_ends = recording.time(request)
    timing = "undisturbed" if recorded == completion and len(ends) >= len(own_ends) else "while_recording"
    if timing == "while_recording":
        print(
            "the traced request took other passes when it was timed (a tie): its seconds hold the recording", flush=True
        )
        ends = own_ends
    recording.free()
    return recorded, recording.steps_until(ends), timing


def note(
    model: BlockDiffusionLM, tokenizer: PreTrainedTokenizerBase, request: Request, **options: Any
) -> tuple[Completion, list[TraceStep]]:
    """Decode a request alone, and once; return its answer and the steps that led to it, timed while recording.

    Args:
        options: as `record` takes them; is_fused too.
    """
    engine = _RecordingEngine(model, tokenizer, batch_size=1, is_graphed=False, **options)
    completion, ends = engine.time(request)
    return completion, engine.steps_until(ends)


class _TimedEngine(Engine):
    """Notes when each pass over a request ends."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.ends: list[float] = []

    def time(self, request: Request) -> tuple[Completion, list[float]]:
        """Return the answer, and the seconds from the beginning to the end of each pass."""
        self.ends = []
        started = time.perf_counter()
        (completion,) = self.run([request])
        return completion, [end - started for end in self.ends]

    def _prepared(self, rows: list[Row], run: Callable, **options: int) -> Callable[[], Tensor | None]:
        call = super()._prepared(rows, run, **options)
        return (lambda: self._watched(call)) if rows else call  # without rows it is a report

    def _watched(self, call: Callable[[], Tensor | None]) -> None:
        call()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.ends.append(time.perf_counter())


class _RecordingEngine(_TimedEngine):
    """Notes what each pass over a request wrote."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.steps_class = noting(VerifySteps if self.decode.is_verified else Steps)
        self.passes: list[TraceStep | None] = []

    def steps_until(self, ends: list[float]) -> list[TraceStep]:
        """Return the recorded steps, each with the end of its last pass."""
        pairs = zip(self.passes, ends, strict=False)  # an engine with graphs may run a pass too many
        return [replace(step, seconds=round(end, DIGITS)) for step, end in pairs if step is not None]

    def _watched(self, call: Callable[[], Tensor | None]) -> None:
        state, slot = self.state, 0
        phase, before = Phase(int(state.phase[slot])), state.tokens[slot].clone()
        if not self.passes or self.passes[-1] is not None:  # else a probe, whose layers and rows count here
            self._counts = state.counts[slot].tolist()
        self.steps.seen.clear()
        super()._watched(call)
        is_new = (before == self.model.mask_token_id) & (state.tokens[slot] != self.model.mask_token_id)
        self.passes.append(self._step(phase, is_new.nonzero()[:, 0].tolist()) if phase in KIND_OF else None)

    def _step(self, phase: Phase, places: list[int]) -> TraceStep:
        counts = dict(zip(COUNTERS, self.state.counts[0].tolist(), strict=True))
        grown = {name: counts[name] - before for name, before in zip(COUNTERS, self._counts, strict=True)}
        return TraceStep(
            kind=KIND_OF[phase],
            seconds=0.0,
            rows=grown["rows_run"] // grown["layers_run"] if grown["layers_run"] else 0,
            reused=self._reused() if KIND_OF[phase] == "reuse" else [],
            tokens=[self._unmasked(place) for place in places],
        )

    def _reused(self) -> list[int]:
        num_layers = self.model.num_layers
        return list(range(num_layers) if self.steps.is_output else self.reuse.layers(num_layers))

    def _unmasked(self, place: int) -> Unmasked:
        token, probability = int(self.state.tokens[0, place]), self.steps.seen[place]
        best = probability.topk(min(NUM_ALTERNATIVES + 1, len(probability)))
        choices = [
            Choice(token=other, text=self.tokenizer.decode([other]), probability=round(value, DIGITS))
            for value, other in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if other != token and value > 0.5 * 10**-DIGITS
        ]
        return Unmasked(
            place=place,
            token=token,
            text=self.tokenizer.decode([token]),
            confidence=round(min(float(probability[token]), 1.0), DIGITS),
            alternatives=choices[:NUM_ALTERNATIVES],
        )


def noting(base: type[Steps]) -> type[Steps]:
    """Return `base` with `seen`: what each place of the only slot was proposed from in the last pass, [V] float32."""

    class Noting(base):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.seen: dict[int, Tensor] = {}
            self._behind: Tensor | None = None

        def _note(self, places: Tensor, hidden: Tensor) -> None:
            """Keep the probabilities [T, V] of the tokens at `places` [T], from hidden [T, C]."""
            self.seen |= zip(places.tolist(), self.model.logits(hidden).softmax(-1), strict=True)

        def _propose(self, at: SlotNumbers, hidden: Tensor) -> tuple[Proposals, Tensor]:
            first = at.start + at.offset if self.is_diffusion else at.start + 1
            if int(at.phase) == Phase.APPEND:  # the first places of the next block
                first = at.start + self.model.block_size
            self._note(first + torch.arange(hidden.shape[1], device=first.device), hidden[0])
            return super()._propose(at, hidden)

        def _propose_for_next(self, at: SlotNumbers, hidden: Tensor, chosen: Tensor) -> Proposals:
            self._note(at.start + at.offset + chosen + 1, hidden)
            return super()._propose_for_next(at, hidden, chosen)

        def _best(self, hidden: Tensor) -> Tensor:
            self._behind = hidden
            return super()._best(hidden)

        def _begin_block(self, at: SlotNumbers, block: Tensor, is_begun: Tensor, token: Tensor) -> Tensor:
            if self._behind is not None:  # the last row of a prompt's last block, or of an appended one
                self._note(at.start, self._behind)
                self._behind = None
            return super()._begin_block(at, block, is_begun, token)

        def _choose(self, at: SlotNumbers, hidden: Tensor, count: int, best_of: Callable) -> Tensor:
            self._note(at.start + 1 + torch.arange(count, device=hidden.device), hidden[0, :count])
            return super()._choose(at, hidden, count, best_of)

    return Noting
