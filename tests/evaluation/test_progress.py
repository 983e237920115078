import random
import re

import pytest
from lm_eval.api.instance import Instance

from fastdllm.checkpoint import load_checkpoint
from fastdllm.evaluation.harness import FastDLLMv2, run_task
from fastdllm.evaluation.progress import Progress, running_value
from fastdllm.evaluation.scoring import wilson_interval
from fastdllm.evaluation.tasks import load_task


class FakeTask:
    """Scores an answer by whether it is "yes"; its filter adds a space and draws a random number."""

    UNSAFE_CODE = False

    def __init__(self, value=float, aggregate="mean"):
        self.value = value
        self.mean = lambda values: sum(values) / len(values)
        self.mean.__name__ = aggregate
        self._filters = [self]

    def apply(self, instances):
        random.random()
        for instance in instances:
            instance.filtered_resps["none"] = instance.resps[0] + " "

    def process_results(self, doc, results):
        doc["touched"] = True
        return {"acc": self.value(results[0] == "yes ")}

    def aggregation(self):
        return {"acc": self.mean}


def instances(number, each=1):
    return [
        Instance(request_type="generate_until", doc={}, arguments=("q",), idx=idx, metadata=("toy", doc, 1))
        for doc in range(number)
        for idx in range(each)
    ]


def last_line(capsys):
    return re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]


def test_wilson_interval_by_hand():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_the_line_counts_what_was_there_and_what_finishes_and_scores_both(capsys):
    requests = instances(4)
    with Progress(requests, {"toy": FakeTask()}, {2: "yes"}, interval=1e-9) as progress:
        progress.finish(0, "yes")
        assert "2 of 4" in last_line(capsys)
        progress.finish(3, "no")
        progress.finish(1, "yes")
    line = last_line(capsys)
    assert "4 of 4" in line and "samples/s" in line and "left" in line
    assert "accuracy 75.0 % (95 %: 30.1 to 95.4)" in line


def test_a_problem_of_several_requests_is_one_sample(capsys):
    with Progress(instances(2, each=2), {}, {}, interval=1e-9) as progress:
        for number in (0, 2, 3):
            progress.finish(number, (-1.0, False))
        assert "1 of 2" in last_line(capsys)


def test_scoring_leaves_instances_and_random_numbers_as_they_were():
    (request,) = instances(1)
    random.seed(3)
    expected = random.Random(3).random()
    assert running_value(FakeTask(), [request], ["yes"]) == 1.0
    assert random.random() == expected
    assert (request.resps, request.filtered_resps, request.doc) == ([], {}, {})


@pytest.mark.parametrize("change", [{"value": lambda is_right: [is_right]}, {"aggregate": "f1"}, {"unsafe": True}])
def test_what_runs_code_or_needs_all_samples_has_no_accuracy(change, capsys):
    task = FakeTask(**{name: value for name, value in change.items() if name != "unsafe"})
    task.UNSAFE_CODE = "unsafe" in change
    with Progress(instances(2), {"toy": task}, {}, interval=1e-9) as progress:
        progress.finish(0, "yes")
        progress.finish(1, "yes")
    line = last_line(capsys)
    assert "2 of 2" in line and "accuracy" not in line


@pytest.mark.parametrize("task", ["toy_problems", "toy_letters"])
def test_the_running_accuracy_ends_at_that_of_lm_eval(adapted, capsys, task):
    lm = FastDLLMv2(checkpoint=load_checkpoint(adapted), device="cpu")
    result = run_task(lm, load_task(task))
    accuracy = sum(problem["correct"] for problem in result.problems) / 4
    assert f"accuracy {100 * accuracy:.1f} %" in last_line(capsys)
