"""What was to be compiled runs compiled: everything else is an error, not a slower run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

WARMUP_MICRO_BATCHES = 2
WAY_OUT = "TORCH_LOGS=graph_breaks,recompiles says why; --compile none trains without."


class Compilation:
    """Watches over the graphs of the layers and the loss, each of which is compiled in one piece or not at all."""

    def __init__(self):
        self._num_micro_batches = 0

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Say what to do where dynamo, told to compile everything, does not.

        Raises:
            RuntimeError: a graph break, or more graphs of one function than dynamo allows.
        """
        try:
            yield
        except (Unsupported, FailOnRecompileLimitHit) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise RuntimeError(
                "a layer, or the loss, must compile to one graph for each of its uses, in all at most "
                f"{torch._dynamo.config.recompile_limit}, got {reason!r}. {WAY_OUT}"
            ) from error

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Count the graphs that one micro-batch compiles.

        Raises:
            RuntimeError: there are any after the first micro-batches of this start: shapes must not change.
        """
        before = _num_graphs()
        yield
        self._num_micro_batches += 1
        num_new = _num_graphs() - before
        if num_new and self._num_micro_batches > WARMUP_MICRO_BATCHES:
            raise RuntimeError(
                f"{num_new} graphs were compiled again in micro-batch {self._num_micro_batches} of this start: "
                f"training shapes must not change. {WAY_OUT}"
            )


def _num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
