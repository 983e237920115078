"""python -m fastdllm COMMAND: the small commands beside train.py and evaluate.py."""

import sys
from dataclasses import dataclass
from pathlib import Path

from fastdllm import demo
from fastdllm.cli import main_of, run, run_command


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's newest complete checkpoint as an HF folder, or a gated adapter's folder, <run>/export."""

    run: str
    """Run folder, such as runs/demo."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a hub id or a GGUF file into a local HF folder, without adapting it."""

    source: str
    """Hub id, HF folder or .gguf file of the Qwen2.5 family."""
    output: str
    """Folder to write."""


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Draw the training curves of runs, from TensorBoard's events, into a PNG."""

    runs: list[str]
    """Run folders, such as [runs/demo, runs/tiny_full]."""
    output: str
    """PNG to write."""


def export(arguments: list[str]) -> None:
    """Write a run's newest checkpoint as an HF folder."""
    run(ExportConfig, _export, arguments)


def _export(config: ExportConfig) -> None:
    from fastdllm.training.export import export_run  # read behind the options: it takes seconds, and a slip none

    export_run(config.run)


def convert(arguments: list[str]) -> None:
    """Turn a hub id or a GGUF file into a local HF folder."""
    run(ConvertConfig, _convert, arguments)


def _convert(config: ConvertConfig) -> None:
    import torch

    from fastdllm.checkpoint import load_checkpoint, save_checkpoint

    source = load_checkpoint(config.source, dtype=torch.bfloat16)
    weights, qwen_config = source.qwen.state_dict(), source.config
    save_checkpoint(
        config.output,
        weights,
        qwen_config,
        source.tokenizer,
        source.mask_token_id,
        source.adaptation,
        dtype=torch.bfloat16,
    )
    print(f"{config.source} is now the HF folder {config.output}")


def curves(arguments: list[str]) -> None:
    """Draw the training curves of runs as a picture."""
    run(CurvesConfig, _curves, arguments)


def _curves(config: CurvesConfig) -> None:
    from fastdllm.evaluation.plots import draw_curves

    print(draw_curves({Path(folder).name: folder for folder in config.runs}, config.output))


COMMANDS = {
    "doctor": main_of("fastdllm.demo.doctor", "Say what this machine can do, what is missing, whether a run fits."),
    "export": export,
    "convert": convert,
    "curves": curves,
    "inspect-data": main_of("fastdllm.demo.inspect_data", "Show samples, labels, blocks and masks of a training run."),
    "distill": main_of("fastdllm.distill", "Let a model answer prompts, as training data."),
    **demo.COMMANDS,
    "serve": main_of("fastdllm.serving.command", "Answer OpenAI's clients over HTTP."),
}


def main() -> None:
    run_command("fastdllm", COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    main()
