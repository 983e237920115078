"""Curves from TensorBoard's events: every start of a run counts, the later one where both logged a step."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from fastdllm.evaluation.events import write_events
from fastdllm.evaluation.plots import draw_curves, read_scalars

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


def test_a_folder_without_events_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no TensorBoard events"):
        read_scalars(tmp_path)
