"""What strategies do to layers: under hooks that gather weights, whole layers still share one compiled graph."""

from functools import partial

import pytest
import torch
from conftest import make_qwen
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from fastdllm.model import BlockDiffusionLM, ChosenRows
from fastdllm.training.strategies import shard

counters = torch._dynamo.utils.counters


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone, whose hooks are those of many."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    torch.distributed.destroy_process_group()


def run_pass(model, seed):
    """Return the hidden states of some rows and all gradients."""
    torch.manual_seed(seed)
    tokens, positions = torch.randint(0, 256, (2, 12)), torch.arange(12).expand(2, -1)
    attention_mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    chosen = ChosenRows(torch.arange(5).expand(2, -1), attention_mask[:, :, :5])
    model.zero_grad()
    hidden = model(tokens, positions, attention_mask, chosen=chosen)
    hidden.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [hidden, *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)]


class Pass(BlockDiffusionLM):
    forward = BlockDiffusionLM.hidden_states  # FSDP2's root hooks are on the call


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_whole_layers_share_one_graph_and_break_none(is_sharded, recompute, mesh, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no C++ compiler, less time
    plain, ours = (Pass(make_qwen(num_hidden_layers=4).train(), block_size=4, mask_token_id=259) for _ in range(2))
    ours.use_training_form(recompute, is_compiled=True)
    if is_sharded:
        shard(ours, ours.qwen.model.layers, mesh, torch.float32)
    torch._dynamo.reset()
    counters.clear()
    for seed in range(3):
        for expected, found in zip(run_pass(plain, seed), run_pass(ours, seed), strict=True):
            assert_close(found, expected)
        assert counters["stats"]["unique_graphs"] == 2, "one for whole layers, one for the last"
    assert not counters["graph_break"]
