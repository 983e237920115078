"""The unmasking of a sample in TensorBoard: the text and the figure by hand, and what a run writes, read back."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdllm.decoding.rows import Completion, Request
from fastdllm.decoding.trace import TraceStep, Unmasked
from fastdllm.objective import ObjectiveConfig
from fastdllm.training import callbacks, trainer
from fastdllm.training.config import run_folder
from fastdllm.training.run import train
from fastdllm.training.unmasking import Unmasking

TAG = "samples/unmasking"


def step(kind, *written):
    tokens = [
        Unmasked(place=place, token=0, text=text, confidence=confidence, alternatives=[])
        for place, text, confidence in written
    ]
    return TraceStep(kind=kind, seconds=0.0, rows=4, reused=[], tokens=tokens)


def by_hand(kind="full", block_size=4):
    """Six tokens behind a prompt of six, in blocks of four: one pass writes beyond the end."""
    steps = [
        step("prefill"),
        step(kind, (7, "b", 0.5)),
        step(kind, (6, "\n", 0.25)),
        step("append", (8, "c", 1.0)),
        step(kind, (9, "``` d", 0.75), (11, "e", 0.9), (10, "f", 0.8), (12, "past", 0.1)),
    ]
    model = type("Model", (), {"block_size": block_size})
    request = Request(prompt=[1] * 6, max_new_tokens=9)
    counts = dict.fromkeys(("prefill_passes", "denoise_passes", "append_passes", "full_passes", "layers_run"), 0)
    done = Completion(index=0, tokens=[0] * 6, text="", counted_tokens=6, computed_tokens=7, **counts)
    return Unmasking.of(model, request, done, steps)


def test_each_pass_is_a_line_with_what_is_new_and_what_is_still_masked():
    head, rest = by_hand().describe().split("\n\n```\n")
    assert head.startswith("**6 tokens in 5 passes**")
    assert rest.removesuffix("\n```").split("\n") == [
        "   1 prefill   +0",
        "   2 full      +1   ░[b]",  # the block holds two tokens of the prompt
        "   3 full      +1   [⏎]b",
        "   4 append    +1   [c]░░░",
        "   5 full      +3   c[``` d][f][e]",  # and nothing behind the answer's end
    ]
    assert "```" not in [line.strip() for line in rest.split("\n")[:-1]]  # no token ends the block


def test_without_blocks_a_line_has_the_new_tokens_alone():
    lines = by_hand(kind="token").describe().split("\n")
    assert lines[4] == "   2 token     +1   [b]" and lines[6] == "   4 append    +1   [c]"


def test_the_figure_has_each_token_at_its_pass_in_the_colour_of_its_confidence():
    figure = by_hand().draw("optimizer step 9")
    axes = figure.axes[0]
    there, confidence = (image.get_array() for image in axes.get_images())
    expected = np.full((5, 6), np.nan)
    expected[1, 1], expected[2, 0], expected[3, 2], expected[4, 3:] = 0.5, 0.25, 1.0, [0.75, 0.8, 0.9]
    np.testing.assert_array_equal(np.ma.filled(confidence.astype(float), np.nan), expected)
    np.testing.assert_array_equal(there.sum(axis=0), [3, 4, 2, 1, 1, 1])  # passes after which each place is there
    assert [line.get_xdata()[0] for line in axes.lines] == [2.5]  # the answer's third token begins a block
    assert axes.get_title() == "optimizer step 9: 6 tokens in 5 passes"
    assert not by_hand(kind="token").draw("").axes[0].lines


def board(config):
    return EventAccumulator(str(run_folder(config) / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def texts(events, tag):
    found = events.Tensors(f"{tag}/text_summary") if f"{tag}/text_summary" in events.Tags()["tensors"] else []
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


def test_a_run_shows_the_same_sample_each_time_and_twice_the_same(make_config):
    config = make_config(max_steps=4, sample_every=2, sample_tokens=12, num_samples=2)
    train(config)
    events = board(config)
    shown = texts(events, TAG)
    assert set(shown) == {2, 4} and shown[2] != shown[4]
    images = {event.step: event.encoded_image_string for event in events.Images(TAG)}
    assert set(images) == {2, 4}
    sizes = [Image.open(io.BytesIO(image)).size for image in images.values()]
    assert all(width == 720 and height >= 240 for width, height in sizes) and len(images[4]) < 100_000
    again = dataclasses.replace(config, name="again")
    train(again)
    events = board(again)
    assert texts(events, TAG) == shown
    assert {event.step: event.encoded_image_string for event in events.Images(TAG)} == images


@pytest.mark.parametrize("kind", ["block_diffusion", "autoregressive"])
def test_the_unmasked_sample_is_the_first_of_the_text_samples(make_config, kind):
    objective = ObjectiveConfig(kind=kind, block_size=8)
    config = make_config(max_steps=2, sample_every=2, sample_tokens=12, num_samples=2, objective=objective)
    train(config)
    events = board(config)
    first = texts(events, "samples/text")[2].split("\n\n**")[0]
    shown = texts(events, TAG)[2]
    passes = [line for line in shown.split("\n") if line[:4].strip().isdigit()]
    kinds = {"token"} if kind == "autoregressive" else {"full", "sub_block", "append"}
    assert kinds <= {line.split()[1] for line in passes} <= kinds | {"prefill"}
    assert sum(int(line.split("+")[1].split()[0]) for line in passes) == 12  # random weights never stop
    assert f"12 tokens in {len(passes)} " in first.replace(" forward", "") and f"in {len(passes)} passes" in shown


def test_it_changes_no_weight_and_can_be_switched_off(make_config, capsys):
    on = make_config(max_steps=2, sample_every=1, sample_tokens=4, num_samples=1)
    off = dataclasses.replace(on, name="off", sample_trace=False)
    train(on)
    traced = [line for line in capsys.readouterr().out.split("\n") if line.startswith(("sample at", "trained to"))]
    train(off)
    plain = [line for line in capsys.readouterr().out.split("\n") if line.startswith(("sample at", "trained to"))]
    assert plain == traced and len(plain) == 3
    assert not texts(board(off), TAG) and not board(off).Tags()["images"]


def test_without_matplotlib_the_text_alone_is_shown_and_said_once(make_config, monkeypatch, capsys):
    for module in (trainer, callbacks):
        monkeypatch.setattr(module, "can_draw", lambda: False)
    config = make_config(max_steps=2, sample_every=1, sample_tokens=4, num_samples=1)
    train(config)
    assert capsys.readouterr().out.count("no figure of the sample's unmasking") == 1
    assert set(texts(board(config), TAG)) == {1, 2} and not board(config).Tags()["images"]
