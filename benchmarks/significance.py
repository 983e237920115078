"""Is a difference between two cells more than chance? Tests on pairs: the same problems, answered under both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdllm.evaluation.outcomes import Outcomes, read_outcomes
from fastdllm.evaluation.results import Row, describe_decoding

RESAMPLES = 10_000  # so that the smallest p-value is 2 in 10,001
RESAMPLES_AT_ONCE = 500
SEED = 0
HEADER = (
    *("model", "decoding", "accuracy, points (95 %)", "won", "lost", "p", "p, Holm"),
    *("tokens per forward (95 %)", "p", "p, Holm"),
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one cell has more than another, on the same problems."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p_value: float
    """Two-sided, uncorrected."""
    won: int | None = None
    """Problems that only this cell has right; None where problems are not right or wrong."""
    lost: int | None = None


def mcnemar_p_value(won: int, lost: int) -> float:
    """Return the exact two-sided p-value of `won` against `lost` problems, were both equally likely.

    Source: McNemar 1947, in its exact form: twice the smaller tail of a binomial with probability 1/2, at most 1.
    """
    number = won + lost
    term, tail = 1, 1  # binomial coefficients, summed up to min(won, lost)
    for taken in range(min(won, lost)):
        term = term * (number - taken) // (taken + 1)
        tail += term
    return min(1.0, 2 * tail / 2**number)  # integers: exact until this division


def difference_interval(won: int, lost: int, number: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of (won - lost) / number, within [-1, 1].

    Source: Agresti and Min 2005: half a problem more in each cell of the 2 x 2 table, then the normal interval.
    """
    won, lost, number = won + 0.5, lost + 0.5, number + 2
    centre = (won - lost) / number
    spread = 1.96 * math.sqrt(won + lost - (won - lost) ** 2 / number) / number
    return max(-1.0, centre - spread), min(1.0, centre + spread)


def paired_bootstrap(
    own: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]], seed: int = SEED
) -> Difference:
    """Return the difference of two ratios of sums, with percentile interval, from resampled problems.

    Args:
        own, other: numerators and denominators, one of each per problem; ones as denominators make a mean.
    The p-value is twice the share of resamples on the far side of zero, the sample itself counted as one of them.
    """
    columns = np.array([*own, *other], dtype=np.float64)  # [4, P]
    number = columns.shape[1]
    random = np.random.RandomState(seed)  # its stream never changes between versions, unlike the newer generators'
    resampled = []
    for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        chosen = random.randint(number, size=(min(RESAMPLES_AT_ONCE, RESAMPLES - start), number))
        sums = columns[:, chosen].sum(-1)  # [4, R]
        resampled.append(sums[0] / sums[1] - sums[2] / sums[3])
    differences = np.concatenate(resampled)
    low, high = np.percentile(differences, [2.5, 97.5])
    totals = columns.sum(-1)
    far = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(
        value=float(totals[0] / totals[1] - totals[2] / totals[3]),
        low=float(low),
        high=float(high),
        p_value=float(min(1.0, 2 * (far + 1) / (RESAMPLES + 1))),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values as corrected for their number. Source: Holm 1979, the step-down procedure."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def compare_accuracy(row: Row, reference: Row) -> Difference:
    """Return the difference in accuracy, in [-1, 1]: exact McNemar where problems are right or wrong, else a bootstrap.

    Raises:
        ValueError: rows that do not tell what each problem got, or of other problems, or of another metric.
    """
    own, other = _pair(row, reference)
    if not (own.is_binary and other.is_binary):
        ones = [1.0] * len(own.correct)
        return paired_bootstrap((own.correct, ones), (other.correct, ones))
    won = sum(mine > theirs for mine, theirs in zip(own.correct, other.correct, strict=True))
    lost = sum(mine < theirs for mine, theirs in zip(own.correct, other.correct, strict=True))
    low, high = difference_interval(won, lost, len(own.correct))
    value = (won - lost) / len(own.correct)
    return Difference(value=value, low=low, high=high, p_value=mcnemar_p_value(won, lost), won=won, lost=lost)


def compare_tokens_per_forward(row: Row, reference: Row) -> Difference | None:
    """Return the difference in tokens per forward by a bootstrap; None where either counts none.

    Raises: what `compare_accuracy` does.
    """
    own, other = _pair(row, reference)
    if own.tokens is None or other.tokens is None:
        return None
    return paired_bootstrap((own.tokens, own.passes), (other.tokens, other.passes))


def _pair(row: Row, reference: Row) -> tuple[Outcomes, Outcomes]:
    own, other = read_outcomes(row), read_outcomes(reference)
    if own.problems != other.problems or row["metric"] != reference["metric"]:
        raise ValueError(
            f"rows {row['cell']} and {reference['cell']} hold {len(own.correct)} and {len(other.correct)} problems of "
            f"{row['task']} ({row['metric']}) and {reference['task']} ({reference['metric']}), which are not the same: "
            "only answers to the same problems can be paired; measure both with the same task and limit."
        )
    return own, other


def significance_lines(rows: Sequence[Row], reference: Row) -> list[list[str]]:
    """Return a header and one line per row, all text: its difference from `reference`, itself left out.

    Both families of p-values, those of accuracy and those of tokens per forward, are corrected for the number of lines.

    Raises: what `compare_accuracy` does.
    """
    others = [row for row in rows if row["cell"] != reference["cell"]]
    accuracies = [compare_accuracy(row, reference) for row in others]
    speeds = [compare_tokens_per_forward(row, reference) for row in others]
    corrected = holm([each.p_value for each in accuracies])
    counted = iter(holm([each.p_value for each in speeds if each is not None]))
    lines = [list(HEADER)]
    for row, accuracy, speed, adjusted in zip(others, accuracies, speeds, corrected, strict=True):
        counts = ["-" if count is None else str(count) for count in (accuracy.won, accuracy.lost)]
        line = [row["label"], describe_decoding(row), _signed(accuracy, 100, 1), *counts]
        line += [_p(accuracy.p_value), _p(adjusted)]
        line += ["-"] * 3 if speed is None else [_signed(speed, 1, 2), _p(speed.p_value), _p(next(counted))]
        lines.append(line)
    return lines


def _signed(difference: Difference, factor: float, decimals: int) -> str:
    value, low, high = (
        f"{factor * number + 0.0:+.{decimals}f}" for number in (difference.value, difference.low, difference.high)
    )
    return f"{value} ({low} to {high})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def reference_of(rows: Sequence[Row], **wanted: Any) -> Row:
    """Return the one row whose fields have the wanted values, repeat 1 where there are several.

    Raises:
        ValueError: none, or more than one.
    """
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    found = [row for row in found if row["config"].get("repeat", 1) == 1] or found
    if len(found) != 1:
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
        cells = ", ".join(row["cell"] for row in found or rows)
        raise ValueError(f"a comparison needs one reference row with {asked}, got {len(found)}; among: {cells}.")
    return found[0]
