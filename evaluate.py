"""Evaluate a checkpoint: `python evaluate.py --reuse_k 2 --subset first`; `--help` documents every option."""

from fastdllm.cli import run
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.run import evaluate

if __name__ == "__main__":
    run(EvaluateConfig, evaluate)
