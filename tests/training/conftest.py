"""A tiny model and sums in words to train on, and ways to start train() here and as a program."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, make_qwen
from safetensors.torch import load_file

from fastdllm.checkpoint import add_mask_token, save_checkpoint
from fastdllm.cli import to_yaml
from fastdllm.data.datamodule import DataConfig
from fastdllm.objective import ObjectiveConfig
from fastdllm.training.config import TrainConfig, run_folder
from fastdllm.training.module import OptimizerConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def source(tmp_path_factory, byte_tokenizer):
    """Folder with a random checkpoint `fresh` and `train.jsonl`."""
    folder = tmp_path_factory.mktemp("source")
    qwen = make_qwen()
    mask_token_id = add_mask_token(byte_tokenizer, VOCABULARY)
    weights = qwen.state_dict()
    save_checkpoint(folder / "fresh", weights, qwen.config, byte_tokenizer, mask_token_id, None, dtype=torch.float32)
    draw = random.Random(0)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(120):
            a, b = draw.randint(1, 20), draw.randint(1, 20)
            row = {"prompt": f"{a}+{b}=?", "response": f"The sum of {a} and {b} is {a + b}."}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def make_config(source, tmp_path):
    """Return a TrainConfig of 8 optimizer steps in tmp_path; arguments replace its fields."""

    def make(**changes) -> TrainConfig:
        data = DataConfig(
            path=str(source / "train.jsonl"),
            sample_length=64,
            validation_samples=2,
            cache_dir=str(source / "prepared"),
            num_workers=0,
            loader_workers=0,
        )
        fields = dict(
            name="tiny",
            checkpoint=str(source / "fresh"),
            output_dir=str(tmp_path),
            max_steps=8,
            accelerator="cpu",
            micro_batch_size=2,
            global_batch_size=4,
            log_every=1,
            checkpoint_every=3,
            validate_every=4,
            objective=ObjectiveConfig(block_size=8),
            data=data,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        )
        return TrainConfig(**{**fields, **changes})

    return make


def exported_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the weights of the run's export."""
    return load_file(run_folder(config) / "export" / "model.safetensors")


def by_hand(*values):
    """A case that CI leaves out for its time: pytest -m by_hand."""
    return pytest.param(*values, marks=pytest.mark.by_hand)


def flip_a_bit(file):
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def run_program(config: TrainConfig, kill_after: int = 0, sent: signal.Signals = signal.SIGKILL) -> list[str]:
    """Run train.py on the config and return its lines.

    After step kill_after, SIGKILL goes to all its processes, another signal to the one that was started.
    """
    file = Path(config.output_dir) / f"{config.name}.yaml"
    file.write_text(to_yaml(config))
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    lines = []
    for line in program.stdout:
        lines.append(line.rstrip())
        if kill_after and line.startswith(f"step {kill_after}/"):
            if sent != signal.SIGKILL:
                os.kill(program.pid, sent)
                continue
            os.killpg(program.pid, sent)
            break
    program.wait()
    assert kill_after or program.returncode == 0, "\n".join(lines)
    return lines
