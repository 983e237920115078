"""Curves from TensorBoard's events: every start of a run counts, the later one where both logged a step."""

import pytest
from matplotlib.axes import Axes
from torch.utils.tensorboard import SummaryWriter

from fastdllm.evaluation.events import write_events
from fastdllm.evaluation.plots import (
    draw_accuracy,
    draw_attention_mask,
    draw_curves,
    drawn_from,
    pareto,
    read_scalars,
    rows_digest,
)

from .rows import cell, fake_row


def log(folder, values):
    with SummaryWriter(folder) as writer:
        for step, value in values.items():
            for tag in ("train/loss", "train/masked_accuracy", "throughput/tokens_per_second"):
                writer.add_scalar(tag, value, step)
            writer.add_scalar("data/tokens", 1000 * step, step)


def test_a_later_start_replaces_what_it_repeats(tmp_path):
    log(tmp_path / "tensorboard", {1: 3.0, 2: 2.5, 3: 9.0})
    log(tmp_path / "tensorboard2", {3: 2.0, 4: 1.5})
    assert read_scalars(tmp_path)["train/loss"] == [(1, 3.0), (2, 2.5), (3, 2.0), (4, 1.5)]


def test_evaluations_in_the_run_folder_are_no_part_of_its_curves(tmp_path):
    log(tmp_path / "tensorboard", {1: 3.0})
    write_events(tmp_path / "cells" / "one", fake_row(cell()))
    assert "evaluation/accuracy" not in read_scalars(tmp_path) and "train/loss" in read_scalars(tmp_path)


def test_curves_of_two_runs_are_a_png(tmp_path):
    for name in ("a", "b"):
        log(tmp_path / name, {1: 3.0, 2: 2.0})
    figure = draw_curves({"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "out" / "curves.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_runs_that_draft_have_a_panel_for_it(tmp_path, monkeypatch):
    log(tmp_path / "plain", {1: 3.0})
    log(tmp_path / "drafts", {1: 3.0})
    with SummaryWriter(tmp_path / "drafts") as writer:
        writer.add_scalar("train/accepted_length", 2.5, 1)
    names, set_axes = [], Axes.set
    monkeypatch.setattr(Axes, "set", lambda axes, **labels: (names.append(labels["ylabel"]), set_axes(axes, **labels)))
    draw_curves({"plain": tmp_path / "plain"}, tmp_path / "a.png")
    assert len(names) == 3 and "right drafts in a row (tokens)" not in names
    draw_curves({"plain": tmp_path / "plain", "drafts": tmp_path / "drafts"}, tmp_path / "b.png")
    assert len(names) == 7 and "right drafts in a row (tokens)" in names


def test_the_frontier_holds_what_nothing_beats_in_both():
    assert pareto([(1, 9), (2, 8), (2, 7), (3, 8), (4, 1), (4, 1)]) == [(1, 9), (3, 8), (4, 1)]


@pytest.fixture
def drawn(monkeypatch):
    """The error bars that were drawn: x, y, its errors in x and y."""
    calls, draw = [], Axes.errorbar

    def note(axes, x, y, xerr, yerr, **style):
        calls.append((x, y, xerr, yerr))
        return draw(axes, x, y, xerr=xerr, yerr=yerr, **style)

    monkeypatch.setattr(Axes, "errorbar", note)
    return calls


def test_repeats_are_one_point_with_their_range(tmp_path, drawn):
    again = [fake_row(cell(repeat=n), tokens_per_second=speed) for n, speed in ((1, 15.0), (2, 21.0))]
    draw_accuracy([*again, fake_row(cell(mode="ar"))], tmp_path / "figure.png")
    assert len(drawn) == 4  # two cells on two axes
    x, y, xerr, yerr = drawn[2]
    assert (x, y) == (18.0, 75.0) and xerr == [[3.0], [3.0]]
    assert [y - yerr[0][0], y + yerr[1][0]] == pytest.approx([30.06, 95.44], abs=0.01)


def test_repeats_whose_mean_is_rounded_beyond_them_are_drawn(tmp_path):
    rows = [fake_row(cell(repeat=n), tokens_per_second=0.1, accuracy=0.1) for n in (1, 2, 3)]
    assert sum([0.1] * 3) / 3 > 0.1
    assert draw_accuracy(rows, tmp_path / "figure.png").exists()


def test_a_figure_has_the_same_bytes_twice_and_says_what_it_was_drawn_from(tmp_path):
    rows = [fake_row(cell()), fake_row(cell(reuse_k=2), tokens_per_second=20.0)]
    once, again = (draw_accuracy(rows, tmp_path / name) for name in ("a.png", "b.png"))
    assert once.read_bytes() == again.read_bytes() and once.stat().st_size < 200_000
    assert drawn_from(once) == rows_digest(rows) != rows_digest(rows[:1])
    assert drawn_from(tmp_path / "none.png") is None
    assert drawn_from(draw_attention_mask(tmp_path / "mask.png")) is None


def test_a_folder_without_events_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no TensorBoard events"):
        read_scalars(tmp_path)
