"""Training time, without validation, samples and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts seconds from `start`, less those spent paused."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Begin at zero."""
        self._started = time.perf_counter()
        self._paused_at = self._started
        self._paused_seconds = 0.0

    def seconds(self) -> float:
        """Return the training seconds since `start`."""
        return self.wall_seconds() - self._paused_seconds

    def wall_seconds(self) -> float:
        """Return all seconds since `start`."""
        return time.perf_counter() - self._started

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self._paused_seconds += time.perf_counter() - self._paused_at

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self.pause()
        try:
            yield
        finally:
            self.resume()
