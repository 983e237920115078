"""Adapt a checkpoint: `python train.py --config configs/demo.yaml --max_steps 10`; `--help` documents every option."""

import sys

from fastdllm.cli import parse
from fastdllm.training.run import CannotStart, TrainConfig, train

if __name__ == "__main__":
    try:
        train(parse(TrainConfig))
    except CannotStart as error:
        sys.exit(f"error: {error}")
