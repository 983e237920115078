"""Evaluate a checkpoint: `python evaluate.py --reuse_k 2 --subset first`; `--help` documents every option."""

from fastdllm.cli import run
from fastdllm.evaluation.run import EvaluateConfig, evaluate

if __name__ == "__main__":
    run(EvaluateConfig, evaluate)
