"""Paired tests against numbers worked out by hand, and rows that cannot be paired."""

import itertools
import json

import pytest
from significance import (
    HEADER,
    compare_accuracy,
    compare_tokens_per_forward,
    difference_interval,
    holm,
    mcnemar_p_value,
    paired_bootstrap,
    reference_of,
    significance_lines,
)

from fastdllm.decoding.rows import Completion
from fastdllm.evaluation.outcomes import pack_outcomes, read_outcomes

from .rows import cell, fake_row


def completion(tokens, denoise, append):
    return Completion(
        index=0, tokens=[], text="", counted_tokens=tokens, computed_tokens=tokens, prefill_passes=1,
        denoise_passes=denoise, append_passes=append, full_passes=0, layers_run=0,
    )  # fmt: skip


def packed(correct, tokens=None, passes=None, mode="diffusion", first=0):
    """Return the outcomes of problems first, first + 1, ... of a task; passes are denoise and append passes."""
    problems = [
        {"task": "toy", "doc_id": first + number, "target": "4", "correct": value}
        for number, value in enumerate(correct)
    ]
    pairs = zip(tokens or [], passes or [], strict=True)
    done = {("toy", first + number): completion(t, *p) for number, (t, p) in enumerate(pairs)}
    return pack_outcomes(problems, done, mode=mode)


def row(correct, tokens=None, passes=None, of=None, **fields):
    return fake_row(of or cell(), outcomes=packed(correct, tokens, passes), **fields)


@pytest.mark.parametrize(
    "won, lost, expected",
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (3, 3, 1.0),  # twice the tail is above 1
        (7, 2, 2 * (1 + 9 + 36) / 512),
    ],
)
def test_mcnemar_is_twice_the_binomial_tail(won, lost, expected):
    assert mcnemar_p_value(won, lost) == mcnemar_p_value(lost, won) == expected


def test_mcnemar_gives_what_was_published_for_real_pairs_and_stays_exact_for_many():
    assert mcnemar_p_value(100, 58) == pytest.approx(0.001, abs=5e-4)
    assert mcnemar_p_value(145, 133) == pytest.approx(0.51, abs=5e-3)
    assert 0 < mcnemar_p_value(7300, 6700) < 1e-6


def test_the_interval_of_a_difference_is_worked_out_by_hand():
    # 9 won, 3 lost of 98: 9.5, 3.5 and 100; 0.06 -+ 1.96 * sqrt(13 - 0.36) / 100 = 0.06 -+ 0.069684
    assert difference_interval(9, 3, 98) == pytest.approx((-0.009684, 0.129684), abs=1e-6)
    assert difference_interval(6, 0, 6) == pytest.approx((0.75 - 1.96 * 2.5**0.5 / 8, 1))
    low, high = difference_interval(0, 0, 50)
    assert low == -high and high == pytest.approx(1.96 / 52, abs=1e-9)


def test_holm_steps_down_from_the_smallest_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_bootstrap_agrees_with_all_resamples_of_four_problems():
    own, other = ([4, 6, 9, 2], [2, 2, 3, 1]), ([3, 3, 4, 2], [2, 2, 2, 2])
    every = []
    for chosen in itertools.product(range(4), repeat=4):
        sums = [sum(column[index] for index in chosen) for column in (*own, *other)]
        every.append(sums[0] / sums[1] - sums[2] / sums[3])
    every.sort()
    found = paired_bootstrap(own, other)
    assert found.value == 21 / 8 - 12 / 8
    assert found.low == pytest.approx(every[int(0.025 * len(every))], abs=0.06)
    assert found.high == pytest.approx(every[int(0.975 * len(every))], abs=0.06)
    assert found.p_value == pytest.approx(2 / 10_001) and min(every) > 0
    assert paired_bootstrap(own, other) == found
    assert paired_bootstrap(own, own).p_value == 1.0


def test_outcomes_survive_a_row_file_in_the_order_of_problems_with_one_character_each():
    written = packed([1, 0, 1.0], [7, 8, 9], [(2, 1), (3, 1), (4, 2)])
    assert written["correct"] == "101" and written["tokens"] == "7 8 9" and written["passes"] == "3 4 6"
    read = read_outcomes(json.loads(json.dumps(fake_row(cell(), outcomes=written))))
    assert (read.correct, read.tokens, read.passes) == ((1.0, 0.0, 1.0), (7, 8, 9), (3, 4, 6)) and read.is_binary
    assert packed([1], [5], [(5, 9)], mode="ar")["passes"] == "5"
    third = read_outcomes(fake_row(cell(), outcomes=packed([0.25, 1 / 3])))
    assert third.correct == (0.25, 1 / 3) and third.tokens is None and not third.is_binary
    assert read_outcomes(fake_row(cell(), outcomes=packed([0.5]))).correct == (0.5,)
    backwards = [{"task": "toy", "doc_id": n, "target": "4", "correct": n} for n in (1, 0)]
    assert pack_outcomes(backwards, {}, mode="ar") == packed([0, 1])


def test_accuracy_is_compared_on_pairs():
    found = compare_accuracy(row([1, 1, 1, 0, 1, 1]), row([0, 0, 1, 1, 0, 0]))
    assert (found.won, found.lost, found.value) == (4, 1, 0.5)
    assert found.p_value == mcnemar_p_value(4, 1)
    graded = compare_accuracy(row([0.5, 0.75]), row([0.25, 0.25]))
    assert graded.value == 0.375 and graded.won is None and graded.low > 0


def test_rows_of_other_problems_or_without_outcomes_are_no_pair():
    for other in (row([1, 0, 1]), fake_row(cell(), outcomes=packed([1, 0], first=1))):
        with pytest.raises(ValueError, match="not the same.*same task and limit"):
            compare_accuracy(row([1, 0]), other)
    with pytest.raises(ValueError, match="not the same"):
        compare_accuracy(row([1, 0]), row([1, 0], metric="other"))
    with pytest.raises(ValueError, match="older than that.*--force"):
        compare_accuracy(row([1, 0]), fake_row(cell()))


def test_the_table_has_differences_counts_and_corrected_p_values():
    reference = row([0] * 6, [10] * 6, [(10, 0)] * 6, of=cell(threshold=1.0))
    better = row([1] * 6, [10] * 6, [(5, 0)] * 6, of=cell())
    same = row([0] * 6, [10] * 6, [(10, 0)] * 6, of=cell(reuse_k=2))
    header, *lines = significance_lines([reference, better, same], reference)
    assert header == list(HEADER)
    assert lines[0][1:] == [
        "threshold 0.9, k1 (no reuse)", "+100.0 (+36.3 to +100.0)", "6", "0", "0.031", "0.062",
        "+1.00 (+1.00 to +1.00)", "< 0.001", "< 0.001",
    ]  # fmt: skip
    assert lines[1][2:7] == ["+0.0 (-24.5 to +24.5)", "0", "0", "1.000", "1.000"] and lines[1][8:] == ["1.000", "1.000"]
    likelihood = significance_lines([row([1]), row([0], of=cell(reuse_k=2))], row([1]))[1]
    assert likelihood[7:] == ["-", "-", "-"]
    assert compare_tokens_per_forward(row([1]), row([1])) is None


def test_the_reference_is_one_row():
    rows = [row([1], of=cell(threshold=1.0)), row([1], of=cell()), row([1], of=cell(repeat=2))]
    assert reference_of(rows, threshold=0.9) is rows[1]
    with pytest.raises(ValueError, match="one reference row with threshold=0.5, got 0"):
        reference_of(rows, threshold=0.5)
    with pytest.raises(ValueError, match="mode=diffusion, got 2"):
        reference_of(rows, mode="diffusion")
