"""Options of evaluate.py: what they may be, and together."""

import pytest

from fastdllm.cli import parse
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.evaluation.config import AxesConfig, EvaluateConfig, varied


def test_axes_are_lists_on_the_command_line():
    arguments = "--axes.threshold [0.8,1] --axes.batch_size [1,32] --axes.use_block_cache [true,false]"
    config = parse(EvaluateConfig, [*arguments.split(), "--axes.subset", "[first,'3,4']", "--reuse_k", "2"])
    assert varied(config) == {
        "threshold": [0.8, 1.0],
        "use_block_cache": [True, False],
        "subset": ["first", "3,4"],
        "batch_size": [1, 32],
    }
    assert varied(EvaluateConfig()) == {}
    assert varied(EvaluateConfig(grid=True)) == {"reuse_k": [1, 2, 3], "subset": ["first", "middle", "last"]}


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"threshold": [0.9, 1.5]}, r"axes.threshold must be in \(0, 1\], got 1.5"),
        ({"batch_size": [0]}, "axes.batch_size must be 1 or more, got 0"),
        ({"sub_block_size": [8, 0]}, "axes.sub_block_size must be 1 or more, got 0"),
        ({"reuse_k": [2, 0]}, "axes.reuse_k must be 1 or more, got 0"),
        ({"max_new_tokens": [-1]}, "axes.max_new_tokens must be 0 or more, got -1"),
        ({"budget": [-0.1]}, "axes.budget must be 0 or more, got -0.1"),
    ],
)
def test_values_of_axes_have_the_ranges_of_their_settings(axes, message):
    with pytest.raises(ValueError, match=message):
        AxesConfig(**axes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 4, "axes": AxesConfig(batch_size=[1])}, "batch_size: given, and varied"),
        ({"decode": DecodeConfig(sub_block_size=4), "axes": AxesConfig(sub_block_size=[8])}, "decode.sub_block_size: "),
        ({"grid": True, "axes": AxesConfig(reuse_k=[2])}, "grid varies reuse_k and subset itself"),
        ({"checkpoint": "a", "axes": AxesConfig(checkpoint=["b"])}, "axes.checkpoint names the checkpoints"),
        ({"threshold": 0.5, "axes": AxesConfig(policy=["factor", "margin"])}, "does nothing with decode.policy factor"),
        ({"subset": "last", "axes": AxesConfig(reuse_k=[1])}, "subset last.*no effect with reuse_k 1"),
        ({"reuse_k": 2, "axes": AxesConfig(use_block_cache=[False])}, "needs decode.use_block_cache true"),
        ({"repeat": 0}, "repeat must be 1 or more, got 0"),
        ({"budget": 0.1}, "budget 0.1 does nothing in schedule fixed"),
        ({"schedule": "adaptive"}, "schedule adaptive needs reuse_mode delta or attn"),
        ({"schedule": "adaptive", "reuse_mode": "attn", "reuse_k": 2}, "reuse_k 2 does nothing in schedule adaptive"),
        ({"active_rows": "needed", "reuse_k": 2}, "do not go together"),
        ({"active_rows": "needed", "decode": DecodeConfig(use_block_cache=False)}, "active_rows needed.* needs decode"),
    ],
)
def test_what_is_given_twice_or_for_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**changes)


def test_thresholds_given_in_two_ways_must_agree():
    with pytest.raises(ValueError, match="contradicts"):
        EvaluateConfig(threshold=0.5, decode=DecodeConfig(threshold=0.7))
    assert EvaluateConfig(threshold=0.7, decode=DecodeConfig(threshold=0.7)).threshold == 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse_k": 2, "decode": DecodeConfig(use_block_cache=False)},
        {"grid": True, "subset": "last"},
        {"threshold": 1.5},
        {"batch_size": 0},
        {"grid": True, "reuse_k": 2},
        {"engine": "transformers", "mode": "diffusion"},
    ],
)
def test_contradictions_are_refused(changes):
    with pytest.raises(ValueError):
        EvaluateConfig(**changes)
