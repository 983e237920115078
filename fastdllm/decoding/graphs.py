"""CUDA graphs of passes: a fixed sequence of kernels is recorded once for each number of slots, then replayed."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastdllm.decoding.state import to_device

WARM_UPS = 2  # runs before recording, in which libraries and compilers set themselves up


def recorded_size(count: int) -> int:
    """Return the least of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below `count`: few graphs, little waste."""
    if count < 2:
        return count
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def read_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy the tensor to the host; return what waits for the copy, and gives it."""
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    is_there = torch.cuda.Event()
    is_there.record()

    def wait() -> Tensor:
        is_there.synchronize()
        return copy

    return wait


class GraphedPass:
    """A pass over slots, whose numbers are filled up with the spare slot to 1, 2, 3, 4, 6, 8, 12, 16, ...

    Without a pool of graph memory the pass is called as it is, with the numbers as they are.
    """

    def __init__(self, run: Callable[[Tensor], Tensor | None], spare: int, device: torch.device, pool):
        self.run, self.spare, self.device, self.pool = run, spare, device, pool
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None]] = {}
        self._held: dict[int, list[int]] = {}

    def prepare(self, count: int) -> float:
        """Record the pass for `count` slots, unless it is there; return the seconds that it took, warm-up included."""
        size = recorded_size(count)
        if self.pool is None or size in self._graphs:
            return 0.0
        started = time.perf_counter()
        self._graphs[size] = self._record(size)
        return time.perf_counter() - started

    def __call__(self, slots: list[int]) -> Tensor | None:
        """Run the pass, which is prepared; return what it returns, which the next call overwrites."""
        if self.pool is None:
            return self.run(to_device(slots, self.device))
        size = recorded_size(len(slots))
        graph, numbers, result = self._graphs[size]
        if self._held.get(size) != slots:
            numbers.copy_(to_device(slots + [self.spare] * (size - len(slots)), self.device))
            self._held[size] = list(slots)
        graph.replay()
        return result

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None]:
        numbers = torch.full((size,), self.spare, device=self.device)  # the spare slot is left as it is
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.run(numbers)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # cuBLAS's scratch memory must come from the graph's own pool: what torch keeps elsewhere is given back when
        # anyone clears it, as torch.compile's graphs do, and replays would write where nothing is
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.run(numbers)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.synchronize(self.device)
        return graph, numbers, result
