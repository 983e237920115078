"""The schedule and the sums for the log, by hand; what the optimizer decays."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_qwen

from fastdllm.model import BlockDiffusionLM
from fastdllm.objective import ObjectiveConfig, Targets
from fastdllm.training.meter import Meter, Scores
from fastdllm.training.module import AdaptModule, OptimizerConfig, learning_rate_factor
from fastdllm.training.strategies import clip_gradients


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = OptimizerConfig(warmup_steps=4, min_ratio=0.2)
    factors = [learning_rate_factor(step, 12, config) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.6)  # half way: the middle of 1 and 0.2
    assert factors[12] == pytest.approx(0.2)


def test_constant_schedule_stays_at_the_peak():
    config = OptimizerConfig(warmup_steps=1, schedule="constant")
    assert [learning_rate_factor(step, 3, config) for step in range(3)] == [1.0, 1.0, 1.0]


def test_every_option_of_the_optimizer_reaches_it():
    options = OptimizerConfig(learning_rate=0.5, weight_decay=0.25, beta1=0.75, beta2=0.625, epsilon=0.125)
    model = BlockDiffusionLM(make_qwen(), block_size=8, mask_token_id=259)
    module = AdaptModule(
        model, objective=ObjectiveConfig(), optimizer=options, max_steps=1, log_every=1, sample_length=32
    )
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        assert (group["initial_lr"], group["betas"], group["eps"]) == (0.5, (0.75, 0.625), 0.125)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    layer, embedding = model.qwen.model.layers[0], model.qwen.model.embed_tokens.weight
    assert [decays[id(p)] for p in (layer.mlp.up_proj.weight, layer.self_attn.q_proj.bias, embedding)] == [0.25, 0, 0]


def test_meter_sorts_targets_by_noise_level_and_next_token_apart():
    meter = Meter(torch.device("cpu"))
    targets = Targets(
        token=torch.arange(6),
        weight=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.3, 0.0]),  # the last row predicts nothing
        noise_level=torch.tensor([0.05, 0.95, 1.0, 0.95, math.nan, 0.95]),
    )
    loss = torch.tensor([1.0, 2.0, 4.0, 6.0, 100.0, 50.0])
    is_correct = torch.tensor([True, False, True, False, True, True])
    scores = Scores(torch.tensor(0.0), loss, is_correct, targets, 0, 0, torch.tensor(0))
    meter.add(scores, torch.tensor(2.5), torch.tensor([3, 5]))
    values = meter.read()
    assert values["loss"] == 2.5
    assert values["loss_by_noise/0.0-0.1"] == 1.0
    assert values["loss_by_noise/0.9-1.0"] == 4.0
    assert values["accuracy_by_noise/0.9-1.0"] == pytest.approx(1 / 3)
    assert values["masked_accuracy"] == 0.5
    assert values["masked_fraction"] == 4 / 16  # 4 masked tokens in two views of 8 document tokens
    assert (values["next_token_loss"], values["next_token_accuracy"]) == (100.0, 1.0)
    assert "loss_by_noise/0.4-0.5" not in values


@pytest.mark.parametrize("largest_norm", [0.5, 100.0, math.inf])
def test_clipping_inside_the_fused_step_equals_clipping_before_it(largest_norm):
    weights, norms = [], []
    for is_fused in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        layer.trainer = SimpleNamespace(strategy=None)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, eps=1.0, fused=is_fused)  # so that scale matters
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(8, 4)).square().sum().backward()
            norms.append(clip_gradients(layer, optimizer, largest_norm))
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(norms[:3], norms[3:])
    assert min(norms) > 0.5
