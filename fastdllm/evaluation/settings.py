"""From options to cells: which checkpoints, which run folders, and every setting that decides a measurement."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdllm.checkpoint import Adaptation, Checkpoint, open_checkpoint
from fastdllm.cli import flatten, to_dict
from fastdllm.decoding.config import DecodeConfig, check_decoding
from fastdllm.decoding.policies import DEFAULT_THRESHOLD, VERIFIED, resolve_parameter
from fastdllm.decoding.reuse import layer_subset
from fastdllm.evaluation.arguments import parse_arguments, pick_dtype, resolve_mode, unused_by_likelihood
from fastdllm.evaluation.config import AxesConfig, EvaluateConfig, given, varied
from fastdllm.evaluation.sweep import DIFFUSION_ONLY, Cell, Settings, make_cell, make_cells, points
from fastdllm.runtime import pick_device

NAMED_SUBSETS = ("first", "middle", "last")
ASKED = (
    *("engine", "reuse_k", "reuse_mode", "schedule", "budget", "active_rows", "subset"),
    *("batch_size", "max_new_tokens", "limit", "prompt", "seed"),
)
DECODING = (*DIFFUSION_ONLY, "adapter", "temperature", "top_p", "engine", "max_new_tokens")
SAMPLING = ("top_p", "seed")
LIKELIHOOD_UNUSED = (*DECODING, "seed")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The measurements asked for on one checkpoint."""

    checkpoint: Checkpoint
    folder: Path
    """Run folder with rows/ and samples/."""
    asked: list[Settings]
    """The settings at each point of the axes, as asked for."""
    cells: list[Cell]
    """Their cells, each once, in the order in which they run."""


def make_plans(config: EvaluateConfig) -> list[Plan]:
    """Return what is asked for, checkpoint by checkpoint; reads no weights.

    Raises:
        ValueError, FileNotFoundError: what cannot be evaluated, or would be the same whatever its value, with the way
            out.
    """
    plans = [_make_plan(one) for one in by_checkpoint(config)]
    _check_effect(config, plans)
    names = [(plan.folder.resolve(), plan.cells[0].settings["label"]) for plan in plans]
    for plan, name in zip(plans, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"axes.checkpoint: {plan.checkpoint.source} and another one are both called {name[1]} in "
                f"{plan.folder}; evaluate them one by one, each with its --label."
            )
    return plans


def by_checkpoint(config: EvaluateConfig) -> list[EvaluateConfig]:
    """Return the config of each checkpoint on its own."""
    if not config.axes.checkpoint:
        return [config]
    axes = dataclasses.replace(config.axes, checkpoint=AxesConfig().checkpoint)
    return [dataclasses.replace(config, checkpoint=source, axes=axes) for source in config.axes.checkpoint]


def _make_plan(config: EvaluateConfig) -> Plan:
    source, device = source_of(config), device_of(config)
    dtype = pick_dtype(config.dtype, device)
    checkpoint = open_checkpoint(source, dtype=dtype, device=device, adapter=config.adapter)
    asked = [resolve_settings(config, checkpoint, point) for point in points(varied(config))]
    cells = make_cells(asked, config.repeat)
    for cell in cells:
        _check_cell(cell, checkpoint)
    return Plan(checkpoint=checkpoint, folder=run_folder(config.run, source), asked=asked, cells=cells)


def _check_cell(cell: Cell, checkpoint: Checkpoint) -> None:
    """Raise ValueError for what the engine would refuse when the cell runs."""
    arguments = parse_arguments(harness_arguments(cell.settings))
    adaptation = checkpoint.adaptation or Adaptation(context_attention="causal")
    check_decoding(
        cell.settings["mode"],
        arguments.decode,
        arguments.reuse,
        block_size=adaptation.block_size,
        num_layers=checkpoint.config.num_hidden_layers,
        context_attention=adaptation.context_attention,
        has_adapter=bool(checkpoint.adapter),
    )


def _check_effect(config: EvaluateConfig, plans: Sequence[Plan]) -> None:
    """Raise ValueError for a value that is given or varied and that no cell depends on."""
    pairs = [(asked, make_cell(asked).settings) for plan in plans for asked in plan.asked]
    chosen = {key.removeprefix("decode.") for key in given(config)} | varied(config).keys()
    inert = {
        f"{name} {asked[name]}": None
        for name in (*DIFFUSION_ONLY, *SAMPLING)
        for asked, _ in pairs
        if name in chosen and all(cell[name] != asked[name] for _, cell in pairs)
    }
    if inert:
        where = "in any cell"
        if all(text.split()[0] in SAMPLING for text in inert):
            where = "at temperature 0, which draws nothing"
        elif all(cell["mode"] == "ar" for _, cell in pairs):
            where = f"in mode ar, which {plans[0].checkpoint.source} is decoded in"
        raise ValueError(f"{', '.join(inert)}: without effect {where}; leave out, or give what it needs (see --help).")


def check_likelihood(config: EvaluateConfig) -> None:
    """Raise ValueError for options that a log-likelihood task would silently ignore."""
    chosen, values = given(config), varied(config)
    own = {key: value for key, value in flatten(config).items() if key in chosen}
    inert = [
        f"{key} {value}" for key, value in (own | values).items() if key.removeprefix("decode.") in (*DECODING, "trace")
    ]
    if inert:
        raise ValueError(unused_by_likelihood(inert))


def device_of(config: EvaluateConfig) -> torch.device:
    """Return the device that is measured on; to list or plan rows it need not be here if their dtype is named too.

    So a cluster's login node without a GPU finds the rows of those that have one: both are in a row's name.
    """
    if (config.status or config.dry_run) and config.device.startswith("cuda") and config.dtype != "auto":
        return torch.device(config.device)
    return pick_device(config.device)


def source_of(config: EvaluateConfig) -> str:
    """Return the checkpoint to evaluate: the one named, else the newest export under runs/."""
    return config.checkpoint or str(newest_export())


def newest_export(runs: str | Path = "runs") -> Path:
    """Return the export folder under `runs` whose config was written last. Raises FileNotFoundError: there is none."""
    configs = sorted(Path(runs).glob("*/export/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise FileNotFoundError(
            f"no export under {runs}/; name one with --checkpoint (data/tiny-adapted is bundled), or make one: "
            "python train.py --config configs/demo.yaml."
        )
    return configs[-1].parent


def run_folder(run: str, source: str) -> Path:
    """Return where rows/ and samples/ go: `run` (a name or path), the run that exported `source`, or runs/<name>."""
    if run:
        return Path(run) if "/" in run else Path("runs") / run
    path = Path(source)
    return path.parent if _is_run_export(path) else Path("runs") / default_label(source)


def default_label(source: str) -> str:
    """Return a short name for a checkpoint: the run of an export, else the last part of its path or hub id."""
    path = Path(source)
    if _is_run_export(path):
        return path.resolve().parent.name
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name


def _is_run_export(path: Path) -> bool:
    return path.exists() and path.resolve().name == "export"


def resolve_settings(
    config: EvaluateConfig, checkpoint: Checkpoint, point: Mapping[str, Any] | None = None
) -> Settings:
    """Return everything that decides a measurement, with what the export remembers filled in.

    Args:
        point: settings that stand in for the config's own.
    Raises:
        ValueError: no task, diffusion on an autoregressive checkpoint, or a value that cannot be.
    """
    adaptation, default = checkpoint.adaptation, DecodeConfig()
    decode = to_dict(config.decode) | {"threshold": config.threshold or config.decode.threshold}
    if adaptation and not config.threshold and config.decode.threshold == default.threshold:
        decode["threshold"] = adaptation.threshold
    if adaptation and config.decode.sub_block_size == default.sub_block_size:
        decode["sub_block_size"] = adaptation.sub_block_size
    device = device_of(config)
    settings = {
        **{name: getattr(config, name) for name in ASKED},
        **decode,
        "adapter": default_label(config.adapter) if config.adapter else None,
        "label": config.label or default_label(checkpoint.source),
        "task": config.task or (adaptation.task if adaptation else ""),
        "mode": "ar" if config.engine == "transformers" else resolve_mode(config.mode, checkpoint),
        "device": device.type,
        "dtype": str(pick_dtype(config.dtype, device)).removeprefix("torch."),
        **(point or {}),
    }
    if not settings["task"]:
        raise ValueError(
            f"{checkpoint.source} remembers no task; name one, such as --task gsm8k or --task tiny_problems."
        )
    return settings | {
        "policy_parameter": _policy_parameter(settings["policy"], config.decode),
        "subset": canonical_subset(settings["subset"], checkpoint.config.num_hidden_layers),
    }


def _policy_parameter(policy: str, decode: DecodeConfig) -> float | None:
    """Return a policy's parameter: that given with decode.policy, else its default; None for those without one here."""
    parameter = decode.policy_parameter if policy == decode.policy else 0.0
    return None if policy in ("threshold", VERIFIED) else float(resolve_parameter(policy, DEFAULT_THRESHOLD, parameter))


def canonical_subset(subset: str, num_layers: int) -> str:
    """Return the name of a subset: first, middle or last also where it is given as a list, else sorted indices."""
    layers = layer_subset(num_layers, subset)
    names = [name for name in NAMED_SUBSETS if layer_subset(num_layers, name) == layers]
    return subset if subset in NAMED_SUBSETS else names[0] if names else ",".join(map(str, layers))


def harness_arguments(settings: Settings) -> dict[str, Any]:
    """Return the model arguments, under their published names, that make this measurement."""
    names = {
        **{name: name for name in ("mode", "engine", "prompt", "device", "dtype", "seed", "batch_size")},
        **{name: name for name in ("threshold", "reuse_k", "reuse_mode", "use_block_cache", "temperature", "top_p")},
        **{name: name for name in ("policy", "policy_parameter", "fuse_append")},
        **{name: name for name in ("schedule", "budget", "active_rows", "draft_length", "draft_groups")},
        "sub_block_size": "small_block_size",
        "subset": "layer_subset",
    }
    arguments = {theirs: settings[ours] for ours, theirs in names.items() if settings[ours] is not None}
    if settings["max_new_tokens"]:
        arguments["max_new_tokens"] = settings["max_new_tokens"]
    for name in {"layer_subset", "draft_groups"} & arguments.keys():
        arguments[name] = arguments[name].replace(",", "+")
    return arguments
