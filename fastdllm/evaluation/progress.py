"""The line of a running evaluation: samples per second, accuracy so far with its 95 % interval, time left."""

import copy
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from fastdllm.evaluation.scoring import preferred_metric, wilson_interval

FORMAT = "{desc}: {percentage:3.0f} % {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}"
SCREEN_SECONDS, LOG_SECONDS = 1.0, 60.0  # between two prints of the line on a terminal, in a log file


class Progress:
    """Owns the line, and scores what has finished for it.

    Copies go through the task's own filters and scoring, so that lm-eval, whose scoring alone makes the numbers of a
    row, finds everything as it was. A task whose scoring runs code or needs all samples has no accuracy here.
    """

    def __init__(
        self,
        requests: Sequence[Any],
        tasks: Mapping[str, Any],
        done: Mapping[int, Any],
        *,
        is_hidden: bool = False,
        interval: float | None = None,
    ):
        """Show the line.

        Args:
            requests: lm-eval's instances; those of one problem count as one sample.
            tasks: lm-eval's tasks by name; empty: no accuracy.
            done: responses that are there already, by place in `requests`.
            interval: seconds between two prints; None: by whether there is a terminal.
        """
        self.requests, self.tasks = requests, dict(tasks)
        self.correct: list[float] = []
        """Values of the main metric, one per scored sample."""
        self.is_scored = bool(tasks) and not is_hidden
        self._members: dict[tuple[str, int], list[int]] = {}
        for number, request in enumerate(requests):
            self._members.setdefault((request.task_name, request.doc_id), []).append(number)
        self._responses = dict(done)
        self._waiting = [members for members in self._members.values() if self._is_complete(members)]
        self._interval = interval or (SCREEN_SECONDS if sys.stderr.isatty() else LOG_SECONDS)
        self._last = time.monotonic()
        self._bar = tqdm(
            desc="samples",
            total=len(self._members),
            initial=len(self._waiting),
            unit=" samples",
            bar_format=FORMAT,
            mininterval=self._interval,
            miniters=1,
            disable=is_hidden,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if error == (None, None, None):
            self._score_waiting()
        self._bar.close()

    def finish(self, number: int, response: Any) -> None:
        """Take the response to one request; move the line on if its problem has all of them now."""
        self._responses[number] = response
        members = self._members[self.requests[number].task_name, self.requests[number].doc_id]
        if not self._is_complete(members):
            return
        self._waiting.append(members)
        if time.monotonic() - self._last >= self._interval:  # seldom: on a GPU a pass may be running meanwhile
            self._score_waiting()
            self._last = time.monotonic()
        self._bar.update()

    def _is_complete(self, members: list[int]) -> bool:
        return all(number in self._responses for number in members)

    def _score_waiting(self) -> None:
        for members in self._waiting if self.is_scored else ():
            requests = [self.requests[number] for number in members]
            value = running_value(
                self.tasks[requests[0].task_name], requests, [self._responses[number] for number in members]
            )
            if value is None:
                self.is_scored, self.correct = False, []
                break
            self.correct.append(value)
        self._waiting = []
        if self.correct:
            low, high = wilson_interval(sum(self.correct), len(self.correct))
            accuracy = sum(self.correct) / len(self.correct)
            text = f"accuracy {100 * accuracy:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
            self._bar.set_postfix_str(text, refresh=False)


def running_value(task: Any, requests: Sequence[Any], responses: Sequence[Any]) -> float | None:
    """Return the main metric of one problem, in [0, 1]; None if its scoring runs code or needs all samples.

    Args:
        task: lm-eval's task; requests: its instances for this problem, none of which is changed.
    """
    if getattr(task, "UNSAFE_CODE", False):  # lm-eval sets it on such tasks alone
        return None
    copies = [copy.copy(request) for request in requests]
    doc = copy.deepcopy(requests[0].doc)
    for request, response in zip(copies, responses, strict=True):
        request.doc, request.resps, request.filtered_resps = doc, [response], {}
    copies.sort(key=lambda request: request.idx)
    with _same_random():
        for ensemble in task._filters:  # lm-eval has no public way to filter some of the instances
            ensemble.apply(copies)
        metric, filter_name = preferred_metric(requests[0].task_name) or ("", "")
        if filter_name not in copies[0].filtered_resps:
            filter_name = next(iter(copies[0].filtered_resps))
        values = task.process_results(doc, [request.filtered_resps[filter_name] for request in copies])
    metric = metric if metric in values else next(iter(values))
    is_mean = getattr(task.aggregation().get(metric), "__name__", "") == "mean"  # any callable can aggregate
    value = values[metric]
    return float(value) if is_mean and isinstance(value, int | float) and 0 <= value <= 1 else None


@contextmanager
def _same_random() -> Iterator[None]:
    """Leave Python's random numbers as they were: IFEval's scoring draws from them."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
