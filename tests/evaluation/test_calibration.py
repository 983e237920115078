"""Counts of calibration against a slow loop that decodes one token per step by hand, and rows into figures."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from calibration import (
    EDGES,
    Traced,
    above,
    calibration_lines,
    confidence_counts,
    draw_calibration,
    position_counts,
)
from conftest import make_qwen
from report import END, render

from fastdllm.decoding.reference import Decoded, decode_plain, decode_with_stale_keys
from fastdllm.decoding.trace import Candidate
from fastdllm.model import BlockDiffusionLM

MASK, SIZE, SUB_BLOCK = 259, 8, 4
PROMPT, LIMIT = [5, 17, 99, 31, 8], 18


@pytest.fixture
def model():
    qwen = make_qwen(0, initializer_range=0.35, num_hidden_layers=4)  # large weights: varied confidences
    return BlockDiffusionLM(qwen, block_size=SIZE, mask_token_id=MASK)


def trace(model, plain, threshold):
    options = dict(max_new_tokens=LIMIT, stop_ids=frozenset(), sub_block_size=SUB_BLOCK, is_traced=True)
    return Traced(prompt_length=len(PROMPT), decoded=plain(model, PROMPT, threshold=threshold, **options))


def probabilities(model, tokens):
    """Return the distribution for each place behind the first, [T, V], from one pass over all tokens."""
    block = torch.arange(len(tokens)) // SIZE
    seen = (block[:, None] >= block[None])[None, None]
    hidden = model.hidden_states(torch.tensor([tokens]), torch.arange(len(tokens))[None], seen)
    return model.logits(hidden[0]).softmax(-1)


@torch.no_grad()
def slow_counts(model):
    """Decode one token per step by hand; return the tokens, and place, confidence, token, accepted of each proposal."""
    tokens, noted = list(PROMPT), []
    while True:
        tokens += [MASK] * (-len(tokens) % SIZE)
        for first in range(len(tokens) - SIZE, len(tokens), SUB_BLOCK):
            while MASK in tokens[first : first + SUB_BLOCK]:
                given = probabilities(model, tokens)
                masked = [place for place in range(first, first + SUB_BLOCK) if tokens[place] == MASK]
                found = [(place, *map(torch.Tensor.item, given[place - 1].max(-1))) for place in masked]
                best = max(found, key=lambda one: one[1])
                noted += [(place, confidence, token, place == best[0]) for place, confidence, token in found]
                tokens[best[0]] = best[2]
                new = tokens[len(PROMPT) :]
                if len(new[: new.index(MASK)] if MASK in new else new) >= LIMIT:
                    return tokens, noted
        tokens.append(probabilities(model, tokens)[-1].argmax().item())


def test_counts_are_those_of_a_slow_loop(model):
    tokens, noted = slow_counts(model)
    end = len(PROMPT) + LIMIT
    expected = {name: [0] * (len(EDGES) - 1) for name in ("proposals", "right", "waiting", "waiting_right")}
    for place, confidence, token, is_accepted in noted:
        if place < end:
            (number,) = [n for n in range(len(EDGES) - 1) if EDGES[n] < confidence <= EDGES[n + 1]]
            kinds = ["proposals"] + ["right"] * (token == tokens[place])
            kinds += [] if is_accepted else ["waiting"] + ["waiting_right"] * (token == tokens[place])
            for kind in kinds:
                expected[kind][number] += 1
    found = confidence_counts([trace(model, decode_plain, 1.0)])
    assert found == expected
    assert 0 < sum(found["waiting_right"]) < sum(found["waiting"])  # the loop tells right from wrong


@pytest.mark.parametrize("plain", [decode_plain, decode_with_stale_keys])
@pytest.mark.parametrize("threshold", [1.0, 0.05])
def test_passes_of_all_places_are_the_passes_of_the_run(model, plain, threshold):
    traced = trace(model, plain, threshold)
    counts, decoded = position_counts([traced], SIZE), traced.decoded
    assert sum(counts["position_passes"]) == pytest.approx(decoded.denoise_passes + decoded.append_passes)
    unmasked = sum(candidate.is_accepted for step in decoded.trace for candidate in step)
    assert sum(counts["position_tokens"]) == unmasked + decoded.append_passes
    is_parallel = sum(counts["position_tokens"]) > sum(counts["position_passes"]) + 0.5
    assert is_parallel == (threshold < 1)


def test_a_decoder_notes_nothing_unless_asked_and_answers_the_same(model):
    options = dict(max_new_tokens=LIMIT, stop_ids=frozenset(), sub_block_size=SUB_BLOCK, threshold=0.05)
    silent = decode_with_stale_keys(model, PROMPT, **options)
    assert silent.trace is None and silent.tokens == trace(model, decode_with_stale_keys, 0.05).decoded.tokens


def test_places_and_steps_by_hand():
    steps = [
        [Candidate(6, 1, 0.5, True), Candidate(7, 2, 0.4, False)],
        [Candidate(7, 3, 0.6, True)],
        [Candidate(9, 4, 0.9, True), Candidate(10, 5, 0.8, True), Candidate(11, 6, 0.1, False)],
    ]
    traced = Traced(prompt_length=6, decoded=Decoded(tokens=[1, 3, 9, 4], append_passes=1, trace=steps))
    counts = position_counts([traced], 8)
    assert counts["position_tokens"] == [1, 1, 1, 0, 0, 0, 1, 1]
    assert counts["position_passes"] == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert counts["position_steps"] == [0, 1, 1, 0, 0, 0, 1, 2]
    found = confidence_counts([traced])  # places 10 and 11 are behind the answer
    assert sum(found["proposals"]) == 4 and sum(found["right"]) == 3
    assert found["waiting"][3] == 1 and sum(found["waiting_right"]) == 0  # 0.4 is not above 0.4
    assert [above(found["proposals"], EDGES.index(edge)) for edge in (0.3, 0.5, 0.8)] == [4, 2, 1]


@pytest.fixture
def calibrate(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("calibrate")


def test_the_command_writes_a_row_which_a_page_shows(calibrate, adapted, tmp_path):
    options = dict(checkpoint=adapted, limit=2, max_new_tokens=40, threshold=0.2, device="cpu")
    row = calibrate.measure(calibrate.CalibrationConfig(output=str(tmp_path / "calibration.json"), **options))
    assert json.loads((tmp_path / "calibration.json").read_text()) == row
    assert row["num_samples"] == 2 and row["config"]["small_block_size"] == 8 and row["threshold"] == 0.2
    for run in ("one_token", "parallel"):
        assert 0 < row[run]["counted_tokens"] <= 80
    assert row["one_token"]["denoise_passes"] >= row["parallel"]["denoise_passes"]
    assert sum(row["position_passes"]) == pytest.approx(
        row["parallel"]["denoise_passes"] + row["parallel"]["append_passes"]
    )
    page = tmp_path / "page.md"
    page.write_text(
        f"<!-- report: calibration rows=calibration.json -->\n{END}\n"
        f"<!-- report: calibration_figure rows=calibration.json file=figure.png -->\n{END}\n"
    )
    text = render(page)
    assert f"| 0 | {calibration_lines(row)[1][1]} |" in text and "](figure.png)" in text
    assert (tmp_path / "figure.png").stat().st_size < 200_000
    assert (tmp_path / "figure.png").read_bytes() == draw_calibration(row, tmp_path / "again.png").read_bytes()
    (tmp_path / "calibration2.json").write_text("{}")
    page.write_text(f"<!-- report: calibration rows=calibration*.json -->\n{END}\n")
    with pytest.raises(ValueError, match="shows one row, got 2"):
        render(page)


def test_what_cannot_be_calibrated_is_refused(calibrate, adapted, plain, tmp_path):
    output = str(tmp_path / "x.json")
    with pytest.raises(ValueError, match="threshold must be in .0, 1., got 1.0"):
        calibrate.CalibrationConfig(checkpoint=adapted, output=output, threshold=1.0)
    with pytest.raises(ValueError, match="needs an adapted checkpoint"):
        calibrate.measure(calibrate.CalibrationConfig(checkpoint=plain, output=output, device="cpu"))
    with pytest.raises(ValueError, match="toy_letters generates nothing"):
        calibrate.measure(
            calibrate.CalibrationConfig(checkpoint=adapted, output=output, task="toy_letters", device="cpu")
        )
    with pytest.raises(ValueError, match="must divide the block size"):
        calibrate.measure(calibrate.CalibrationConfig(checkpoint=adapted, output=output, sub_block_size=12))
