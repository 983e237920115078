"""Layers that do not compile as they should end training with an error that says what to do."""

from functools import partial

import pytest
import torch
from conftest import make_qwen

from fastdllm.model import BlockDiffusionLM, training_form
from fastdllm.objective import ObjectiveConfig, draw_noise
from fastdllm.training.compilation import WARMUP_MICRO_BATCHES, Compilation
from fastdllm.training.module import AdaptModule, OptimizerConfig

L, D, MASK = 16, 8, 259


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """No C++ compiler, less time; no graphs of other tests."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_batch():
    noise_level, is_masked_first = (drawn[None] for drawn in draw_noise(0, 0, L, D))
    return dict(
        tokens=torch.randint(0, 256, (1, L)),
        document=torch.zeros(1, L, dtype=torch.long),
        position=torch.arange(L)[None],
        is_response=torch.ones(1, L, dtype=torch.bool),
        noise_level=noise_level,
        is_masked_first=is_masked_first,
        step_targets=torch.tensor([L]),
        num_tokens=torch.tensor([L]),
    )


def make_module():
    model = BlockDiffusionLM(make_qwen(), block_size=D, mask_token_id=MASK)
    options = dict(objective=ObjectiveConfig(block_size=D), optimizer=OptimizerConfig(), max_steps=1, log_every=1)
    return AdaptModule(model, sample_length=L, compile_layers=True, recompute="selective", **options)


@pytest.fixture
def module():
    """In its training form, as a trainer would set it up."""
    module = make_module()
    module.model.use_training_form(module.recompute, module.compile_layers)
    return module


def test_a_layer_that_needs_too_many_graphs_is_an_error(module):
    expected = "in all at most 1, got .*limit exceeded.* --compile none"
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(RuntimeError, match=expected):
        module._score(make_batch())
    module._score(make_batch())


def test_a_graph_break_is_an_error(module):
    module.model.qwen.model.layers[0].mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(RuntimeError, match="must compile to one graph .*, got"):
        module._score(make_batch())


def test_a_graph_more_after_the_first_micro_batches_is_an_error():
    double, compilation = training_form(lambda x: 2 * x, "none", is_compiled=True), Compilation()
    for length in range(2, 2 + WARMUP_MICRO_BATCHES):
        with compilation.settled():
            double(torch.ones(length))
    with compilation.settled():
        double(torch.ones(2))
    with pytest.raises(RuntimeError, match="1 graphs were compiled again in micro-batch 4"), compilation.settled():
        double(torch.ones(9))
