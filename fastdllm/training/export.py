"""A run's newest complete checkpoint -> HF folder."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from fastdllm.checkpoint import open_checkpoint, save_checkpoint
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

    Raises:
        FileNotFoundError: there is no complete checkpoint yet.
    """
    snapshot = newest_complete(run / "checkpoints")
    if snapshot is None:
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no complete checkpoint yet; train longer.")
    config = yaml.safe_load((run / CONFIG_FILE).read_text())
    objective, decode = ObjectiveConfig(**config["objective"]), DecodeConfig(**config["decode"])
    lora, source = LoraSettings(**config.get("lora", {})), open_checkpoint(config["checkpoint"])
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
    folder = run / EXPORT_FOLDER
    save_checkpoint(folder, weights, source.config, source.tokenizer, source.mask_token_id, adaptation, dtype=dtype)
    write_text(run / EXPORTED_FILE, f"{snapshot.step}\n")
    print(f"exported step {snapshot.step} to {folder}", flush=True)
    return folder


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
