"""Checkpoints: from a hub id, an HF folder or a GGUF file into stock Qwen2, and back into an HF folder.

Three kinds of folder are read: stock Qwen2 (autoregressive), our exports, and published Fast-dLLM v2 checkpoints. The
last two share weight names and config keys. The published `configuration.py` and `modeling.py`, to which an export's
`auto_map` points, are not ours to ship: whoever wants to run an export with them copies them beside it. No remote code
is run and nothing is unpickled: config and tokenizer are JSON, weights are safetensors or GGUF.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from fastdllm.adapter import check_adapter, load_adapter
from fastdllm.config_json import (
    QWEN_VOCAB_SIZES,
    Adaptation,
    adaptation_of,
    adapted_config,
    qwen_arguments,
    read_config,
    stock_config,
)
from fastdllm.gguf import CONTROL, NORMAL, GgufFile, TokenizerParts
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import nearest_folder, replace_folder, write_text

MASK_TOKEN = "|<MASK>|"
QWEN_MASK_TOKEN_ID = 151665  # the first id that Qwen2.5's tokenizer leaves free
SHARD_SIZE = "5GB"
SUFFIXES = (".json", ".safetensors", ".jinja", ".txt")  # of the files of a checkpoint folder
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt"]
VOLATILE_KEYS = ("transformers_version", "_name_or_path")  # say nothing about the model: not part of its digest


@dataclass(kw_only=True)
class Checkpoint:
    """A model with all that is needed to run it. Its weights are read when first asked for, and then kept."""

    config: Qwen2Config
    """The shape of the model."""
    tokenizer: PreTrainedTokenizerFast
    """Knows the mask token and has a chat template."""
    mask_token_id: int
    """Below the model's vocabulary size."""
    adaptation: Adaptation | None
    """None: a plain autoregressive checkpoint."""
    source: str
    """As the caller named it."""
    adapter: str = ""
    """Folder of the gated adapter in its model; empty: none."""
    read_qwen: Callable[[], Qwen2ForCausalLM]
    read_digest: Callable[[], str]

    @property
    def portable_source(self) -> str:
        """`source` as others may read it: of an absolute path the last part alone."""
        return Path(self.source).name if Path(self.source).is_absolute() else self.source

    @cached_property
    def qwen(self) -> Qwen2ForCausalLM:
        """The stock layers, in evaluation mode."""
        return self.read_qwen()

    @cached_property
    def digest(self) -> str:
        """16 hex digits over config and weight bytes, those of an adapter included."""
        return self.read_digest()

    def release(self) -> None:
        """Let go of the weights; they are read again when next asked for."""
        self.__dict__.pop("qwen", None)
        self.__dict__.pop("_adapted", None)

    def model(self) -> BlockDiffusionLM:
        """Return the block-diffusion model around `qwen`; a plain checkpoint attends causally, in blocks of 32.

        With an adapter it is one model, since the layers of `qwen` then hold it.

        Raises:
            ValueError: the adapter does not belong to these weights.
        """
        return self._adapted if self.adapter else self._model()

    @cached_property
    def _adapted(self) -> BlockDiffusionLM:
        model = self._model()
        load_adapter(model, self.adapter)
        return model

    def _model(self) -> BlockDiffusionLM:
        adaptation = self.adaptation or Adaptation(context_attention="causal")
        return BlockDiffusionLM(
            self.qwen,
            block_size=adaptation.block_size,
            mask_token_id=self.mask_token_id,
            context_attention=adaptation.context_attention,
        )


def load_checkpoint(
    source: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", adapter: str = ""
) -> Checkpoint:
    """Load a hub id, a local HF folder or a local .gguf file (dequantised to dense weights).

    Raises: what `open_checkpoint` does.
        ValueError: weights that do not fit the config.
    """
    checkpoint = open_checkpoint(source, dtype=dtype, device=device, adapter=adapter)
    assert checkpoint.qwen is not None  # read now, so that what is wrong with the weights is found here
    return checkpoint


def open_checkpoint(
    source: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", adapter: str = ""
) -> Checkpoint:
    """Return a checkpoint whose config and tokenizer are read and whose weights are not, yet.

    Args:
        adapter: folder of a gated adapter in PEFT's format that its model shall hold; empty: none.
    Raises:
        FileNotFoundError: the source or one of its files is missing.
        ValueError: another architecture, unsupported attention or RoPE, or a tokenizer without chat template or
            without room for the mask token; an adapter of another kind.
    """
    path = _local_path(source)
    if path.suffix == ".gguf":
        gguf = GgufFile(path)
        raw = gguf.config()
        tokenizer, files = _tokenizer_from_parts(gguf.tokenizer_parts()), [path]
        read_tensors = partial(gguf.tensors, dtype)
    else:
        raw = read_config(path)
        tokenizer, files = _load_tokenizer(path), _weight_files(path)
        read_tensors = partial(_read_tensors, files)
    config = Qwen2Config(**qwen_arguments(raw, source))
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {source} has no chat template; use the Instruct model's tokenizer files.")
    mask_token_id = add_mask_token(tokenizer, config.vocab_size)
    if raw.get("mask_token_id", mask_token_id) != mask_token_id:
        raise ValueError(
            f"{source}: config.json has mask_token_id {raw['mask_token_id']} but its tokenizer gives {MASK_TOKEN} the "
            f"id {mask_token_id}; the two files do not belong together."
        )
    files = files + (check_adapter(adapter, mask_token_id) if adapter else [])
    return Checkpoint(
        config=config,
        tokenizer=tokenizer,
        mask_token_id=mask_token_id,
        adaptation=adaptation_of(raw, source),
        source=source,
        adapter=adapter,
        read_qwen=lambda: _build_qwen(config, read_tensors(), dtype, device, source),
        read_digest=lambda: _digest(raw, files),
    )


def empty_model(source: str) -> Qwen2ForCausalLM:
    """Return the model that the source's config describes, without weights and without storage."""
    path = _local_path(source, config_only=True)
    raw = GgufFile(path).config() if path.suffix == ".gguf" else read_config(path)
    return _empty_qwen(Qwen2Config(**qwen_arguments(raw, source)))


def add_mask_token(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> int:
    """Return the mask token's id, adding the token under the first free id where the tokenizer lacks it.

    Raises:
        ValueError: the id has no embedding row (none is added), or in Qwen2.5 is not the published 151665.
    """
    if MASK_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)], special_tokens=True)
    mask_token_id = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    if mask_token_id >= vocab_size:
        raise ValueError(
            f"The mask token {MASK_TOKEN} gets id {mask_token_id}, but the embedding has only {vocab_size} rows and is "
            f"never resized; use a tokenizer that already holds {MASK_TOKEN}, or a model with a spare row."
        )
    if vocab_size in QWEN_VOCAB_SIZES and mask_token_id != QWEN_MASK_TOKEN_ID:
        raise ValueError(
            f"The mask token {MASK_TOKEN} must have id {QWEN_MASK_TOKEN_ID} in Qwen2.5, as published checkpoints have "
            f"it, got {mask_token_id}; use the tokenizer without added tokens."
        )
    return mask_token_id


def save_checkpoint(
    folder: str | Path,
    state_dict: dict[str, Tensor],
    config: Qwen2Config,
    tokenizer: PreTrainedTokenizerFast,
    mask_token_id: int,
    adaptation: Adaptation | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write an HF folder aside and rename it into place, replacing a checkpoint that lies there.

    Args:
        state_dict: under the names of `Qwen2ForCausalLM`; a tied `lm_head.weight` is left out of the file.
        adaptation: None writes a stock Qwen2 config, which transformers' `AutoModelForCausalLM` reads.
    Raises:
        ValueError: the weights do not fit the config, or `folder` holds something that is no checkpoint.
    """
    folder = Path(folder)
    paths = folder.iterdir() if folder.is_dir() else ()
    others = [path.name for path in paths if not (path.is_file() and path.suffix in SUFFIXES)]
    if others or folder.is_file():
        raise ValueError(
            f"{folder} holds {others[0] if others else 'a file'}, which is no part of a checkpoint, so it is not "
            "replaced; name another folder."
        )
    weights = {name: tensor for name, tensor in state_dict.items() if not _is_tied_head(name, config)}
    _check_weights({name: tensor.shape for name, tensor in weights.items()}, _empty_qwen(config), str(folder))
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    raw = stock_config(config.to_dict(), dtype)
    if adaptation is not None:
        ids = {"eos_token_id": tokenizer.eos_token_id, "mask_token_id": mask_token_id}
        raw = adapted_config(config.to_dict(), dtype, adaptation=adaptation, **ids)
    _write_json(partial / "config.json", raw)
    ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(partial / "generation_config.json", ends | {"do_sample": False})
    _save_tokenizer(partial, tokenizer)
    _save_weights(partial, weights, dtype)
    replace_folder(partial, folder)


def _local_path(source: str, config_only: bool = False) -> Path:
    """Return the folder or file that `source` names, downloaded where it is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    near = nearest_folder(path)
    if path.exists():
        raise ValueError(f"{source} is a file but no .gguf; give its folder, a .gguf file or a hub id.")
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        message = f"{source} does not exist{near}; give an HF folder, a .gguf file or a hub id (owner/name)."
        raise FileNotFoundError(message)
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json"] if config_only else HUB_FILES))
    except OSError as error:  # no network, offline mode, no such repository, no access
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"{source} is no folder below {Path.cwd()}{near}, and as a hub id it could not be downloaded "
            f"({reason}). Give a local HF folder or a .gguf file, or check the name and the network."
        ) from error


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load tokenizer.json, or vocab.json and merges.txt, as they are: without transformers' choice by model type."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return Qwen2Tokenizer.from_pretrained(folder)
    raise FileNotFoundError(f"{folder} has no tokenizer.json (nor vocab.json and merges.txt); copy them there.")


def _tokenizer_from_parts(parts: TokenizerParts) -> PreTrainedTokenizerFast:
    """Build the fast Qwen2 tokenizer with every id as in the file: plain tokens first, special ones added."""
    kinds = list(zip(parts.tokens, parts.token_types, strict=True))
    special = {
        index: AddedToken(token, special=kind == CONTROL, normalized=False)
        for index, (token, kind) in enumerate(kinds)
        if kind != NORMAL
    }
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, (token, kind) in enumerate(kinds) if kind == NORMAL},
        merges=[tuple(merge.split(" ")) for merge in parts.merges],
        added_tokens_decoder=special,
        unk_token=None,
        eos_token=parts.tokens[parts.eos_token_id],
        pad_token=parts.tokens[parts.pad_token_id],
    )
    tokenizer.chat_template = parts.chat_template
    wrong = [token for index, token in enumerate(parts.tokens) if tokenizer.convert_tokens_to_ids(token) != index]
    if wrong:
        raise ValueError(f"The GGUF tokenizer cannot be rebuilt: {len(wrong)} tokens move, the first is {wrong[0]!r}.")
    return tokenizer


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the folder, all of which exist."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {index.name}; download again.")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ValueError(f"{folder} holds pickled weights only, which can run code: never read; use safetensors.")
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping: it cannot be iterated over)
                yield name, file.get_tensor(name)


def _empty_qwen(config: Qwen2Config) -> Qwen2ForCausalLM:
    """Return the stock model without storage."""
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


def _build_qwen(
    config: Qwen2Config,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: str | torch.device,
    source: str,
) -> Qwen2ForCausalLM:
    """Return the stock model holding exactly `tensors`, in `dtype`, with float32 RoPE frequencies."""
    qwen = _empty_qwen(config)
    weights = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in tensors}
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head, embedding = weights.pop("lm_head.weight"), weights.get("model.embed_tokens.weight")
        if embedding is None or not torch.equal(head, embedding):
            raise ValueError(f"{source} says tie_word_embeddings but stores an lm_head.weight unlike its embedding.")
    _check_weights({name: tensor.shape for name, tensor in weights.items()}, qwen, source)
    qwen.load_state_dict(weights, strict=False, assign=True)  # the tied head alone is missing: checked above
    if config.tie_word_embeddings:
        qwen.lm_head.weight = qwen.model.embed_tokens.weight
    qwen.model.rotary_emb = type(qwen.model.rotary_emb)(config).to(device)  # buffers are not stored: float32 afresh
    qwen.model.embed_tokens.padding_idx = None  # the published class freezes <|im_end|>'s row; stock Qwen2 does not
    return qwen.eval()


def _is_tied_head(name: str, config: Qwen2Config) -> bool:
    return name == "lm_head.weight" and config.tie_word_embeddings


def _check_weights(shapes: dict[str, torch.Size], qwen: Qwen2ForCausalLM, source: str) -> None:
    """Raise a ValueError unless `shapes` are exactly the model's, less a tied head."""
    expected = {k: v.shape for k, v in qwen.state_dict().items() if not _is_tied_head(k, qwen.config)}
    problems = {
        "missing": expected.keys() - shapes.keys(),
        "unexpected": shapes.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]},
    }
    found = [f"{len(names)} {kind} (such as {min(names)})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"The weights of {source} do not fit its config: {'; '.join(found)}.")


def _digest(raw: dict[str, Any], weight_files: list[Path]) -> str:
    stable = {key: value for key, value in raw.items() if key not in VOLATILE_KEYS}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for path in weight_files:
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokenizer's files under a class name that transformers 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    is_qwen = tokenizer.convert_tokens_to_ids(MASK_TOKEN) == QWEN_MASK_TOKEN_ID
    _write_json(path, saved | {"tokenizer_class": "Qwen2Tokenizer" if is_qwen else "PreTrainedTokenizerFast"})


def _save_weights(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write model.safetensors, or shards and their index above 5 GB; one shard is in memory beside `weights`."""
    meta = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=SHARD_SIZE)
    for name, members in split.filename_to_tensors.items():
        shard = {key: weights[key].detach().to(device="cpu", dtype=dtype).contiguous() for key in members}
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # safetensors leaves it to its owner alone
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
