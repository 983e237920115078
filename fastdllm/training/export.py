"""A run's newest complete checkpoint -> HF folder, or the folder of a gated adapter."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from fastdllm.adapter import AdapterSettings, adapter_weights, add_adapter, base_checksum, save_adapter
from fastdllm.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from fastdllm.config_json import Adaptation
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.objective import ObjectiveConfig
from fastdllm.runtime import code_revision, write_text
from fastdllm.training.lora import LoraSettings, merged_weights
from fastdllm.training.resume import CONFIG_FILE, locked
from fastdllm.training.snapshots import Snapshot, newest_complete
from fastdllm.training.strategies import read_zero_weights

EXPORT_FOLDER = "export"
EXPORTED_FILE = "exported_step"
PREFIX = "scoring.model.qwen."  # where the LightningModule holds the model
DCP_PREFIX = "state_dict."


def export_run(run: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `<run>/export` from the newest complete checkpoint of the run folder and return it.

    Raises:
        FileNotFoundError: the folder is no run, or has no complete checkpoint yet.
        RuntimeError: a training is using the run folder.
    """
    run = Path(run)
    if not (run / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{run} has no {CONFIG_FILE}, so it is no run folder; give one such as runs/demo.")
    with locked(run):
        return write_export(run, dtype)


def write_export(run: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `<run>/export`: the weights of the newest complete checkpoint, all else from the run's source and config.

    Of a run with adapt gated_lora that is the adapter alone, in PEFT's format.

    Raises:
        FileNotFoundError: there is no complete checkpoint yet.
    """
    snapshot = newest_complete(run / "checkpoints")
    if snapshot is None:
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no complete checkpoint yet; train longer.")
    config = yaml.safe_load((run / CONFIG_FILE).read_text())
    folder, source = run / EXPORT_FOLDER, open_checkpoint(config["checkpoint"])
    if config.get("adapt") == "gated_lora":
        _write_adapter(folder, snapshot, source, config, dtype)
    else:
        _write_model(folder, snapshot, source, config, dtype)
    write_text(run / EXPORTED_FILE, f"{snapshot.step}\n")
    print(f"exported step {snapshot.step} to {folder}", flush=True)
    return folder


def _write_adapter(
    folder: Path, snapshot: Snapshot, source: Checkpoint, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Raises a ValueError if the source is not what was trained on, or the updates are not those of the config."""
    model, trained = source.model(), read_weights(snapshot)
    if base_checksum(model) != snapshot.frozen_checksum:
        raise ValueError(
            f"{snapshot.folder} holds updates of weights with checksum {snapshot.frozen_checksum:08x}, and "
            f"{source.source} has {base_checksum(model):08x}; put back the checkpoint that the run started from."
        )
    add_adapter(model, AdapterSettings(**config["adapter"]), seed=0)
    expected = adapter_weights(model)
    if expected.keys() != trained.keys():
        different = sorted(expected.keys() ^ trained.keys())
        raise ValueError(
            f"{snapshot.folder} does not hold the updates of adapter.targets; the first unlike: {different[0]}."
        )
    model.qwen.load_state_dict(trained, strict=False)
    facts = {
        "window": config["draft"]["window"],
        "task": config["task"],
        "data_tokens": snapshot.data_tokens,
        "revision": code_revision()[0],
    }
    save_adapter(model, folder, base=source.portable_source, facts=facts, dtype=dtype)


def _write_model(
    folder: Path, snapshot: Snapshot, source: Checkpoint, config: dict[str, Any], dtype: torch.dtype
) -> None:
    objective, decode = ObjectiveConfig(**config["objective"]), DecodeConfig(**config["decode"])
    lora = LoraSettings(**config.get("lora", {}))
    adaptation = None
    if objective.kind == "block_diffusion":
        adaptation = Adaptation(
            block_size=objective.block_size,
            first_token=objective.first_token,
            context_attention=objective.context_attention,
            task=config["task"],
            threshold=decode.threshold,
            sub_block_size=decode.sub_block_size,
            data_tokens=snapshot.data_tokens,
            base=source.portable_source,
            revision=code_revision()[0],
        )
    weights = read_weights(snapshot)
    if lora.rank:
        weights = merged_weights(source.model(), weights, lora)
    save_checkpoint(folder, weights, source.config, source.tokenizer, source.mask_token_id, adaptation, dtype=dtype)


def exported_step(run: Path) -> int | None:
    """Return the optimizer step whose weights `<run>/export` holds, or None."""
    file = run / EXPORTED_FILE
    return int(file.read_text()) if file.is_file() and (run / EXPORT_FOLDER).is_dir() else None


def read_weights(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of any strategy, whole, under the names of Qwen2ForCausalLM, on the CPU."""
    if snapshot.strategy.startswith("deepspeed"):
        weights = read_zero_weights(str(snapshot.state))
    elif snapshot.strategy == "fsdp2":
        weights = _read_sharded_weights(snapshot.state)
    else:
        weights = torch.load(snapshot.state, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def _read_sharded_weights(folder: Path) -> dict[str, Tensor]:
    """Read the model's tensors from a torch distributed checkpoint, leaving the optimizer's on disk."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(DCP_PREFIX)
    }
    dcp.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(DCP_PREFIX): weight for name, weight in weights.items()}
