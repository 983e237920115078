"""The metric that lm-eval's code tasks load by the name code_eval, with our sandbox under it.

`evaluate.load("code_eval")` takes a file of this name below the working directory before it downloads one that runs
programs with nothing but a time limit. The library copies this file elsewhere and runs the copy, and it reads the
import lines as text: one package a line.
"""

import datasets

import evaluate
from fastdllm.evaluation.sandbox import run_permitted


class CodeEval(evaluate.Metric):
    """Share of problems whose first program passes its tests."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(
        self, predictions: list[list[str]], references: list[str], k: list[int]
    ) -> tuple[dict[str, float], list[str]]:
        """Return {"pass@1": share} and why each program failed ("" where it passed).

        Args:
            predictions: one program for each problem; references: the tests that are put behind it; k: [1].
        Raises:
            ValueError: several programs a problem, or another k. PermissionError: nobody allowed to run programs.
        """
        if list(k) != [1] or any(len(programs) != 1 for programs in predictions):
            raise ValueError(f"code_eval here knows one program a problem and k = [1], got k = {list(k)}.")
        pairs = zip(predictions, references, strict=True)
        outcomes = [run_permitted(f"{program}\n{tests}") for (program,), tests in pairs]
        share = sum(outcome.has_passed for outcome in outcomes) / len(outcomes)
        return {"pass@1": share}, [outcome.reason for outcome in outcomes]
