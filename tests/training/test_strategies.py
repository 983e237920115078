"""What strategies do to layers: under hooks that gather weights, all whole layers still share one compiled graph."""

import os
from functools import partial
from operator import itemgetter
from unittest.mock import patch

import pytest
import torch
from conftest import make_qwen
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from fastdllm.model import BlockDiffusionLM, ChosenRows
from fastdllm.objective import _scores
from fastdllm.training.module import AdaptModule
from fastdllm.training.strategies import gather_whole_layers, make_strategy, shard
from training.test_compilation import make_batch, make_module

MANY = torch._dynamo.config.recompile_limit + 4  # layers: were each compiled by itself, some would not be at all
# below which ZeRO-3 keeps weights, as it would all of a small model
LIMITS = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
OFF = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
counters = torch._dynamo.utils.counters


@pytest.fixture(scope="module")  # DeepSpeed keeps the first group that it meets
def mesh(tmp_path_factory):
    """A mesh of this process alone, whose hooks are those of many."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("mesh") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with patch.dict(os.environ, LOCAL_RANK="0"):  # DeepSpeed asks for it; with a trainer it leaves more, undone here
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    torch.distributed.destroy_process_group()


@pytest.fixture
def aot_eager(monkeypatch):
    """No C++ compiler, less time; no graphs of other tests."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()


class Pass(BlockDiffusionLM):
    forward = BlockDiffusionLM.hidden_states  # FSDP2's root hooks are on the call


def make_pass():
    return Pass(make_qwen(num_hidden_layers=MANY).train(), block_size=4, mask_token_id=259)


def zero_3(model):
    """Return DeepSpeed's engine around the model; it gives every weight back after each use."""
    strategy = make_strategy("deepspeed_stage_3", "cpu", 1)
    strategy.config["train_micro_batch_size_per_gpu"] = 1
    strategy.config["zero_optimization"] |= {f"stage3_{name}": 0 for name in LIMITS}
    gather_whole_layers(strategy, model.qwen.model.layers, is_compiled=True)
    return strategy._setup_model_and_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]


def whole_gradient(parameter):
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def run_pass(model, seed):
    """Return the hidden states of some rows and all gradients."""
    torch.manual_seed(seed)
    tokens, positions = torch.randint(0, 256, (2, 12)), torch.arange(12).expand(2, -1)
    attention_mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    chosen = ChosenRows(torch.arange(5).expand(2, -1), attention_mask[:, :, :5])
    model.zero_grad()
    hidden = model(tokens, positions, attention_mask, chosen=chosen)
    is_engine = not isinstance(model, Pass)
    (model.backward if is_engine else Tensor.backward)(hidden.square().sum())
    gradients = [whole_gradient(parameter) for parameter in model.parameters()]
    if is_engine:
        model.step()  # else the next gradients are added to these
    return [hidden, *gradients]


@pytest.mark.parametrize(
    ("strategy", "recompute"),
    [("auto", "none"), ("auto", "selective"), ("fsdp2", "selective"), ("zero_3", "none"), ("zero_3", "selective")],
)
def test_whole_layers_share_one_graph_and_break_none(strategy, recompute, mesh, aot_eager):
    plain, ours = make_pass(), make_pass()
    ours.use_training_form(recompute, is_compiled=True)
    if strategy == "fsdp2":
        shard(ours, ours.qwen.model.layers, mesh, torch.float32)
    elif strategy == "zero_3":
        ours = zero_3(ours)
    for seed in range(3):
        for expected, found in zip(run_pass(plain, seed), run_pass(ours, seed), strict=True):
            assert_close(found, expected)
        assert counters["stats"]["unique_graphs"] == 2, "one for whole layers, one for the last"
    assert not counters["graph_break"]


def test_deepspeed_in_bfloat16_gets_the_numbers_of_a_batch_as_they_are(mesh, aot_eager, monkeypatch):
    batch = make_batch() | {"step_targets": torch.tensor([2047.0])}
    seen, step = [], AdaptModule.training_step
    monkeypatch.setattr(AdaptModule, "training_step", lambda *given: seen.append(given[1]) or step(*given))
    strategy = make_strategy("deepspeed_stage_1", "cpu", 1)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=1, precision="bf16-mixed", **OFF)
    trainer.fit(make_module(), DataLoader([batch], collate_fn=itemgetter(0)))
    for name in ("step_targets", "noise_level"):
        assert torch.equal(seen[0][name], batch[name]), "no sum or probability is rounded to bfloat16"


def test_training_under_zero_3_leaves_the_loss_one_graph(mesh, aot_eager):
    torch._dynamo.trace_rules.clear_lru_cache()  # what dynamo notes of torch's functions at its first use
    strategy = make_strategy("deepspeed_stage_3", "cpu", 1)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=1, **OFF)
    trainer.fit(make_module(), DataLoader([make_batch()], collate_fn=itemgetter(0)))
    torch.compile(_scores, fullgraph=True)(torch.randn(5, 260), torch.arange(5), torch.ones(5))
    assert F.linear is torch._C._nn.linear, "DeepSpeed's own has no place in graphs"
