"""The layer loop in training: chosen rows of the last layer, recomputation, and the operations counted."""

import pytest
import torch
from conftest import make_qwen
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fastdllm.model import BlockDiffusionLM, ChosenRows, PassSize, forward_flops


def make_model():
    return BlockDiffusionLM(make_qwen(initializer_range=0.2), block_size=4, mask_token_id=259)


def make_inputs(num_rows=12, num_chosen=5):
    torch.manual_seed(0)
    tokens, positions = torch.randint(0, 256, (2, num_rows)), torch.arange(num_rows).expand(2, -1)
    attention_mask = (torch.rand(2, 1, num_rows, num_rows) < 0.7) | torch.eye(num_rows, dtype=torch.bool)
    index = torch.stack([torch.randperm(num_rows)[:num_chosen].sort().values for _ in range(2)])
    chosen_mask = attention_mask.gather(2, index[:, None, :, None].expand(-1, -1, -1, num_rows))
    return tokens, positions, attention_mask, ChosenRows(index, chosen_mask)


def test_chosen_rows_equal_those_of_a_whole_pass_with_gradients():
    model = make_model()
    *inputs, chosen = make_inputs()
    whole = model.hidden_states(*inputs).gather(1, chosen.index[..., None].expand(-1, -1, 32))
    ours = model.hidden_states(*inputs, chosen=chosen)
    assert_close(ours, whole)
    weights = list(model.parameters())
    theirs = torch.autograd.grad(whole.square().sum(), weights)
    for gradient, expected in zip(torch.autograd.grad(ours.square().sum(), weights), theirs, strict=True):
        assert_close(gradient, expected, atol=1e-4, rtol=1e-4)  # sums of thousands of products, in another order


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradients(recompute):
    model = make_model()
    *inputs, chosen = make_inputs()
    weights = list(model.parameters())
    expected = torch.autograd.grad(model.hidden_states(*inputs, chosen=chosen).square().sum(), weights)
    model.use_training_form(recompute, is_compiled=False)
    ours = torch.autograd.grad(model.hidden_states(*inputs, chosen=chosen).square().sum(), weights)
    for gradient, other in zip(ours, expected, strict=True):
        assert_close(gradient, other, rtol=0, atol=0)


@pytest.mark.parametrize("is_chosen", [False, True])
def test_operations_equal_those_that_torch_counts(is_chosen):
    model, (*inputs, chosen) = make_model(), make_inputs()
    inputs[2] = torch.ones_like(inputs[2])  # the counter counts every pair
    if is_chosen:
        chosen = chosen._replace(attention_mask=torch.ones_like(chosen.attention_mask))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model.hidden_states(*inputs, chosen=chosen if is_chosen else None)
        forward = counter.get_total_flops()
        logits = model.qwen.lm_head(hidden)
        total = counter.get_total_flops()
        torch.autograd.backward(logits.sum())
    num_chosen = 10 if is_chosen else 24
    size = PassSize(24, num_chosen, 24 * 12, num_chosen * 12, 0)
    config = model.qwen.config
    assert forward_flops(config, size) == forward
    assert forward_flops(config, size._replace(num_head_rows=num_chosen)) == total
    assert counter.get_total_flops() == pytest.approx(3 * total, rel=1e-3)
