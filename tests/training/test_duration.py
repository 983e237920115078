"""Operations counted ahead are those that runs counted; the share of the peak is the one in the rows."""

import json
from functools import partial

import pytest
import torch
from conftest import make_qwen

from fastdllm.data.datamodule import DataConfig
from fastdllm.objective import ObjectiveConfig
from fastdllm.training.config import TrainConfig
from fastdllm.training.duration import MEASURED_MFU, hours, measured_mfu, sample_flops, training_flops
from fastdllm.training.lora import LoraSettings
from training.conftest import ROOT
from training.test_preflight import QWEN_0_5B, QWEN_1_5B

ROWS = ROOT / "experiments" / "01_training_throughput" / "rows"
make = partial(TrainConfig, name="x", checkpoint="y", max_steps=1)


def read(name):
    return json.loads((ROWS / f"{name}.json").read_text())


@pytest.mark.parametrize(("name", "shape"), [("qwen2.5-0.5b", QWEN_0_5B), ("qwen2.5-1.5b", QWEN_1_5B)])
def test_a_run_s_operations_and_speed_are_those_of_its_row(name, shape):
    row = read(f"{name}-shared")
    with torch.device("meta"):
        qwen = make_qwen(**shape)
    config = make(data=DataConfig(sample_length=2048))
    flops = training_flops(config, qwen)
    num_samples = row["steps"] * row["micro_batch_size"]
    assert num_samples * flops == pytest.approx(row["operations"], rel=1e-3)
    num_parameters = sum(parameter.numel() for parameter in qwen.parameters())
    seconds = 3600 * hours(num_samples, flops, 989e12, measured_mfu(num_parameters), 1)
    assert seconds == pytest.approx(row["seconds"], rel=0.01)


def test_the_measured_shares_are_in_the_rows():
    rows = [read("qwen2.5-0.5b-shared"), read("qwen2.5-1.5b-shared")]
    assert list(MEASURED_MFU.values()) == pytest.approx([row["mfu"] for row in rows], abs=5e-4)
    assert [measured_mfu(size) for size in (1.6e6, 0.8e9, 0.9e9, 7.6e9)] == [0.377, 0.377, 0.460, 0.460]


def test_operations_of_a_sample_by_hand():
    with torch.device("meta"):  # 2 layers, C 32, 4 heads and 2 key heads of 8, MLP 64, 272 words
        qwen = make_qwen()
    key_value, other, head = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 64, 32 * 272
    config = make(objective=ObjectiveConfig(block_size=8), data=DataConfig(sample_length=16))
    seen = 8 * 8 + 8 * 16  # keys of 16 rows in two blocks, in each of the three parts
    products = 48 * (2 * key_value + other) + 16 * other
    assert sample_flops(config, qwen) == 2 * (products + 16 * head) + 4 * (3 * seen + seen) * 32
    plain = make(objective=ObjectiveConfig(kind="autoregressive"), data=DataConfig(sample_length=32))
    causal = 32 * 33 // 2
    assert sample_flops(plain, qwen) == 2 * 32 * (2 * (key_value + other) + head) + 4 * 2 * causal * 32


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({}, 3), ({"recompute": "selective"}, 3), ({"recompute": "full"}, 4), ({"lora": LoraSettings(rank=4)}, 2)],
)
def test_training_takes_so_many_forward_passes(changes, passes):
    with torch.device("meta"):
        qwen = make_qwen()
    config = make(**changes)
    assert training_flops(config, qwen) == passes * sample_flops(config, qwen)


def test_hours_by_hand():
    assert hours(7200, 10**9, peak=10**9, mfu=0.5, num_devices=4) == 1.0
