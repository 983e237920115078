"""The requests of an engine: they come, wait, take slots, move on from round to round, and leave.

A slot that becomes free keeps its tokens, and their keys and values, until somebody needs it. In a session that stays
open, a new request takes the free slot that holds the longest beginning of its prompt, and reads only the rest: the
next turn of a conversation begins where the last one ended. What may be kept is what `Row.num_clean` says.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.decoding.graphs import read_later
from fastdllm.decoding.rows import Request, Row
from fastdllm.decoding.state import COUNTERS, REPORT_HEAD, Phase

if TYPE_CHECKING:
    from fastdllm.decoding.engine import Engine


class FreeSlots:
    """Owns which slots are free, and the tokens whose keys and values each of them still holds."""

    def __init__(self, count: int, block_size: int):
        self._free, self._block_size = list(range(count)), block_size
        self._held: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._free)

    def take(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Return a slot, and how many of the prompt's tokens it holds, in whole blocks.

        It is the one that holds the most; of equals the one that was free for longest.
        """
        shared = [shared_tokens(self._held.get(slot, []), prompt, self._block_size) for slot in self._free]
        most = max(shared)
        slot = self._free.pop(shared.index(most))
        self._held.pop(slot, None)
        return slot, most

    def give(self, slot: int, tokens: list[int]) -> None:
        """Take a slot back, which holds the keys and values of `tokens`."""
        self._free.append(slot)
        self._held[slot] = tokens


def shared_tokens(first: Sequence[int], second: Sequence[int], block_size: int) -> int:
    """Return how many tokens both begin with, in whole blocks."""
    end = min(len(first), len(second)) // block_size * block_size
    begins = range(0, end, block_size)
    return next((at for at in begins if first[at : at + block_size] != second[at : at + block_size]), end)


class Session:
    """Owns who waits and who has which slot; promises that a request's answer does not depend on the others.

    As a context it gives the engine back at its end. Not to be used by two threads at a time.
    """

    def __init__(self, engine: "Engine", rows: Iterable[Row] = (), most_tokens: int = 0):
        """Begin with the rows, and with slots for them alone; or with none, and slots of `most_tokens` for any.

        Raises:
            RuntimeError: the engine is busy already.
        """
        if engine.is_busy:
            raise RuntimeError("this engine is in the middle of a run; let that end (or close it), or make another.")
        engine.is_busy = True
        self.engine, self.most_tokens = engine, most_tokens
        self.waiting, self.active = deque(rows), []
        self._next_index, self._is_set_up = 0, False

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Forget every request and let the engine go."""
        for row in self.active:
            if self._is_set_up:
                self.engine.state.release(row.slot)
        self.engine.prefill_clock.read(is_waiting=True)
        self.waiting, self.active, self._is_set_up, self.engine.is_busy = deque(), [], False, False

    @property
    def has_work(self) -> bool:
        """Whether another round would do anything."""
        return bool(self.waiting or self.active)

    def submit(self, request: Request, *, is_watched: bool = False) -> Row:
        """Let a request wait for its turn; return the row by which it is followed.

        Args:
            is_watched: whether its `draft` is wanted after every round.
        Raises:
            ValueError: a request that is longer than the session's slots, or that the engine cannot answer.
        """
        row = self.engine._row(self._next_index, request)
        if row.limit > self.most_tokens:
            raise ValueError(
                f"a request of this session must have at most {self.most_tokens} tokens, prompt and answer, got "
                f"{len(request.prompt)} + {request.max_new_tokens}; shorten it, or open the engine for more."
            )
        self._next_index += 1
        row.is_watched = is_watched
        self.waiting.append(row)
        return row

    def drop(self, row: Row) -> None:
        """Forget a request, wherever it is; its slot is free at once. One that has ended stays as it is."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.active:
            self._leave(row)
        row.is_finished = True

    @torch.no_grad()
    def round(self) -> list[Row]:
        """Fill free slots and run the next pass of every slot; return the rows that have moved on, or ended.

        Where memory runs out, half as many slots begin anew.

        Raises:
            ValueError, torch.OutOfMemoryError: not even one slot fits.
        """
        engine, started, captured = self.engine, time.perf_counter(), self.engine.capture_seconds
        try:
            if not self._is_set_up:
                self._set_up()
            moved = self._step()
        except torch.OutOfMemoryError as error:
            self._halve(error)
            moved = []
        engine.seconds += time.perf_counter() - started - (engine.capture_seconds - captured)
        return moved

    def _set_up(self) -> None:
        engine = self.engine
        if self.most_tokens:
            engine._make_room("a request of this session", self.most_tokens, engine.batch_size)
        else:
            engine._set_up(self.waiting)
        self._free, self._asked = FreeSlots(engine.num_slots, engine.model.block_size), deque()
        self._is_set_up = True

    def _step(self) -> list[Row]:
        engine = self.engine
        while self._free and self.waiting:
            row = self.waiting.popleft()
            row.slot, kept = self._free.take(row.request.prompt)
            self.active.append(row)
            engine._admit(row, kept)
        engine._advance(self.active)
        drafts = read_later(engine._pass([], engine._drafted)) if any(row.is_watched for row in self.active) else None
        self._asked.append((list(self.active), read_later(engine._pass([], engine._report)), drafts))
        if len(self._asked) <= engine._lag:
            return []
        rows, answer, drafts = self._asked.popleft()
        rows = [row for row in rows if not row.is_finished]
        moved = self._follow(rows, answer)
        if drafts is not None:
            moved += [row for row in self._look(rows, drafts) if row not in moved]
        for row in rows:
            if row.is_finished:
                self._leave(row)
        return moved

    def _leave(self, row: Row) -> None:
        """Free the slot of a row; what it holds stays for the next one, unless the slots are this run's alone."""
        self.active.remove(row)
        self.engine.state.release(row.slot)
        known = row.request.prompt + row.tokens
        self._free.give(row.slot, known[: row.num_clean] if self.most_tokens else [])

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Begin anew with half the batch size, or give up if that is none."""
        engine = self.engine
        if engine.num_slots == 1:
            raise error
        engine.batch_size = engine.num_slots // 2
        print(
            f"out of memory: going on with {engine.batch_size} requests at a time; finished ones are kept", flush=True
        )
        engine.prefill_clock.read(is_waiting=True)
        engine.free()
        if engine.model.device.type == "cuda":
            torch.cuda.empty_cache()
        for row in self.active:
            row.restart()
        self.waiting.extendleft(reversed(self.active))
        self.active, self._is_set_up = [], False

    def _follow(self, rows: list[Row], answer: Callable[[], Tensor]) -> list[Row]:
        """Take in what the passes did; return the rows that have moved on."""
        engine, report, moved = self.engine, answer().numpy(), []
        size = 1 if engine._is_token_wise else engine.model.block_size
        heads, tails = report[:, :REPORT_HEAD].tolist(), report[:, REPORT_HEAD:]
        for row in rows:
            phase, final, row.num_active, *counts = heads[row.slot]
            before = len(row.tokens)
            if engine._drafts:
                engine._drafts.note(*_growth(row.counts, counts, ("checked_drafts", "accepted_drafts")))
            if phase == Phase.PREFILL:
                phase = row.phase  # the host knows better where it is ahead
            else:
                row.start = max(row.start, (final - 1) // size * size)
            row.follow(phase, final, counts, tails[row.slot], engine.tokenizer)
            if row.is_finished or len(row.tokens) > before:
                moved.append(row)
        return moved

    def _look(self, rows: list[Row], drafts: Callable[[], Tensor]) -> list[Row]:
        """Take in what the passes drafted for the rows that are watched; return those for which that is news."""
        places, mask = drafts().tolist(), self.engine.model.mask_token_id
        return [row for row in rows if row.is_watched and row.look(places[row.slot], mask)]


def _growth(before: list[int], after: list[int], names: tuple[str, ...]) -> list[int]:
    """Return by how much these counters have grown; before the first report they are 0."""
    return [after[index] - (before[index] if before else 0) for index in map(COUNTERS.index, names)]
