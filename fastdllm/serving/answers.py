"""An answer on its way: filled by the thread that decodes, read by any other thread or by an event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from threading import Condition
from typing import NamedTuple

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Completion, Request


class Setting(NamedTuple):
    """What one engine decodes by; the policy's number is each request's own."""

    mode: str
    decode: DecodeConfig
    reuse: ReuseConfig


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is new of an answer since the last update that the same reader got."""

    tokens: list[int]
    """Fresh tokens that are final: nothing takes them back."""
    draft: list[int | None] | None
    """The places behind the final ones in the current block, as they are now; None stands for a masked one. With
    policy verified, the drafts that are checked next. None as a whole: the answer is not watched."""


class Answer:
    """Owns what is known of one answer; every reader gets all of it, in as many updates as it cares to fetch."""

    def __init__(self, request: Request, setting: Setting, is_watched: bool, cancel: Callable[["Answer"], None]):
        self.request, self.setting, self.is_watched = request, setting, is_watched
        self.completion: Completion | None = None
        """Once it has ended well; its index is 0."""
        self.error = ""
        """Why it ended without a completion."""
        self.is_cancelled = self.is_ended = False
        self.tokens: list[int] = []
        """Final so far."""
        self.cached_tokens = 0
        """Tokens of the prompt that were not read again, since the slot held them from before."""
        self.submitted, self.begun, self.ended = time.perf_counter(), 0.0, 0.0
        """When it came, took its slot (0.0: not yet) and ended, in seconds of time.perf_counter."""
        self._draft: list[int | None] = []
        self._version, self._changed, self._cancel = 0, Condition(), cancel
        self._listeners: list[Callable[[], None]] = []

    @property
    def seconds(self) -> float:
        """From when it took its slot to its end, or to now."""
        return (self.ended or time.perf_counter()) - self.begun if self.begun else 0.0

    def cancel(self) -> None:
        """Give it up; its slot is free before the next pass. One that has ended stays as it is."""
        self._cancel(self)

    def result(self) -> Completion:
        """Wait for the end; return the completion.

        Raises:
            RuntimeError: it failed, or was cancelled.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.is_ended)
        if self.completion is None:
            raise RuntimeError(self.error)
        return self.completion

    def __iter__(self) -> Iterator[Update]:
        """Wait for updates until the end, then see `completion` or `error`."""
        reader = _Reader(self)
        while not reader.is_at_end:
            with self._changed:
                self._changed.wait_for(lambda: reader.has_news)
                update = reader.read()
            if update is not None:
                yield update

    async def __aiter__(self) -> AsyncIterator[Update]:
        """As __iter__, without holding up the event loop."""
        reader, arrived, loop = _Reader(self), asyncio.Event(), asyncio.get_running_loop()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads
                loop.call_soon_threadsafe(arrived.set)

        with self._changed:
            self._listeners.append(listener)
        try:
            while not reader.is_at_end:
                arrived.clear()
                with self._changed:
                    update = reader.read() if reader.has_news else None
                if update is not None:
                    yield update
                elif not reader.is_at_end:
                    await arrived.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def begin(self, now: float, cached_tokens: int) -> None:
        """Note that it has its slot, unless it had it before."""
        self.begun, self.cached_tokens = self.begun or now, cached_tokens

    def put(self, tokens: list[int], draft: list[int | None]) -> None:
        """Take in the final tokens so far, and the draft behind them."""
        with self._changed:
            self.tokens += tokens[len(self.tokens) :]
            self._draft = draft
            self._tell()

    def finish(self, completion: Completion) -> None:
        """End well; only what began anew in less precise numbers, after memory ran out, may have gone another way."""
        if completion.tokens[: len(self.tokens)] != self.tokens:
            self.fail("memory ran out, and the answer that began anew differs from what was shown; ask once more.")
            return
        with self._changed:
            self.tokens, self._draft = completion.tokens, []
            self.completion = replace(completion, index=0)
            self._end()

    def fail(self, error: str, is_cancelled: bool = False) -> None:
        """End without a completion, unless it has ended."""
        with self._changed:
            if self.is_ended:
                return
            self.error, self.is_cancelled = error, is_cancelled
            self._end()

    def _end(self) -> None:
        self.is_ended, self.ended = True, time.perf_counter()
        self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


class _Reader:
    """Where one reader is in an answer; used while its lock is held."""

    def __init__(self, answer: Answer):
        self.answer, self.is_at_end = answer, False
        self._taken = self._version = 0

    @property
    def has_news(self) -> bool:
        return self._version != self.answer._version

    def read(self) -> Update | None:
        """Return what is new, None if nothing is but the end."""
        answer, taken = self.answer, self._taken
        self._version, self._taken, self.is_at_end = answer._version, len(answer.tokens), answer.is_ended
        fresh = answer.tokens[taken:]
        if not fresh and (answer.is_ended or not answer.is_watched):
            return None
        return Update(tokens=fresh, draft=list(answer._draft) if answer.is_watched else None)
