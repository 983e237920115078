"""Seconds that some passes take, apart from all others."""

import time
from collections.abc import Callable

import torch


class PassClock:
    """Owns the sum; on a GPU, where passes end later than they are begun, it is up to date only as far as they have."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, call: Callable[[], object]) -> None:
        """Run the pass, and count it."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            self.seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self._running.append((begin, end))
        self.read()  # lets go of the events of those that have ended

    def read(self, is_waiting: bool = False) -> float:
        """Return the seconds of the passes that have ended, or, waiting for them, of all."""
        if is_waiting and self._running:
            torch.cuda.synchronize(self.device)
        while self._running and self._running[0][1].query():  # they end in order
            begin, end = self._running.pop(0)
            self.seconds += begin.elapsed_time(end) / 1e3
        return self.seconds
