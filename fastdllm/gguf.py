"""Reads a Qwen2.5 GGUF file: config keys, dense tensors under transformers' names, and the tokenizer's parts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from torch import Tensor

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # tokenizer.ggml.token_type; control tokens are hidden from decoded text
PADDING_TOKEN = re.compile(r"\[PAD\d+\]")  # what converters put on the embedding's spare rows
SAMPLED_ROWS = 256  # enough to tell two copies of one matrix from two matrices
COPY_COSINE = 0.8  # copies of one matrix agree above 0.95 even at 2 bits; input and output embeddings of 7B do not


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """What a byte-level BPE tokenizer is built from; a token's id is its place."""

    tokens: list[str]
    """Without the placeholders of the embedding's spare rows."""
    token_types: list[int]
    """Of the same length: 1 normal, 3 control, 4 user defined."""
    merges: list[str]
    """Pairs joined by a space, in order of rank."""
    bos_token_id: int | None
    """None: the file names none."""
    eos_token_id: int
    """End of a turn in chat models."""
    pad_token_id: int
    """`eos_token_id` where the file names none."""
    chat_template: str | None
    """Jinja source; None: the file has none."""


class GgufFile:
    """One open file; tensors are read and dequantised only as they are asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._reader = GGUFReader(self.path)
        except (ValueError, IndexError) as error:  # bad magic, unsupported version, cut off in its metadata
            raise ValueError(
                f"{path} is not a readable GGUF file ({error}); the download may be incomplete."
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self._value("general.architecture", "")
        if architecture != "qwen2":
            raise ValueError(
                f"{path} holds architecture {architecture!r}; only qwen2 (the Qwen2.5 family) is supported."
            )
        if self._value("split.count", 1) > 1:
            raise ValueError(f"{path} is one part of a split GGUF; join the parts first (llama-gguf-split --merge).")
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{path} has no token_embd.weight; the file is incomplete.")
        self.is_tied = self._has_tied_embeddings()

    def config(self) -> dict[str, Any]:
        """Return the keys of a stock Qwen2 config.json.

        Raises:
            ValueError: a key is missing, or RoPE is scaled.
        """
        scaling = self._value("qwen2.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(f"{self.path}: RoPE scaling {scaling!r} is not supported; use a file without it.")
        config = {key: self._required(f"qwen2.{name}") for key, name in CONFIG_KEYS.items()}
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # stored in float32: 9.99999997e-07
        return config | {
            "model_type": "qwen2",
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._required("tokenizer.ggml.eos_token_id"),
        }

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight under its transformers name, dense and in `dtype`, one in memory at a time.

        Of a tied model that stores two copies of the embedding, the one with more bits per weight is yielded.
        """
        dropped = self._less_precise_embedding() if self.is_tied else None
        for name, tensor in self._tensors.items():
            if name == dropped:
                continue
            target = GLOBAL_NAMES["token_embd.weight"] if self.is_tied and name == "output.weight" else rename(name)
            yield target, torch.from_numpy(self._dequantise(tensor, slice(None))).to(dtype)

    def tokenizer_parts(self) -> TokenizerParts:
        """Return what the metadata say about the tokenizer.

        Raises:
            ValueError: it is not a Qwen2 byte-level BPE, or a field is missing.
        """
        kind = (self._value("tokenizer.ggml.model", ""), self._value("tokenizer.ggml.pre", ""))
        if kind != ("gpt2", "qwen2"):
            raise ValueError(f"{self.path}: tokenizer {'/'.join(kind)!r} is not supported; only gpt2/qwen2 is.")
        tokens = self._required("tokenizer.ggml.tokens")
        types = self._required("tokenizer.ggml.token_type")
        while tokens and (types[len(tokens) - 1] == UNUSED or PADDING_TOKEN.fullmatch(tokens[-1])):
            tokens.pop()
        eos_token_id = self._required("tokenizer.ggml.eos_token_id")
        return TokenizerParts(
            tokens=tokens,
            token_types=types[: len(tokens)],
            merges=self._value("tokenizer.ggml.merges", []),
            bos_token_id=self._value("tokenizer.ggml.bos_token_id", None),
            eos_token_id=eos_token_id,
            pad_token_id=self._value("tokenizer.ggml.padding_token_id", eos_token_id),
            chat_template=self._value("tokenizer.chat_template", None),
        )

    def _has_tied_embeddings(self) -> bool:
        """No output matrix, or one that is a second copy of the embedding in another quantisation."""
        embedding, output = self._tensors["token_embd.weight"], self._tensors.get("output.weight")
        if output is None:
            return True
        if embedding.shape.tolist() != output.shape.tolist():
            raise ValueError(
                f"{self.path}: token_embd.weight has shape {embedding.shape.tolist()} and output.weight "
                f"{output.shape.tolist()}; they must be equal, so the file is damaged."
            )
        num_rows = len(embedding.data)
        rows = np.linspace(0, num_rows - 1, min(SAMPLED_ROWS, num_rows)).astype(int)
        first, second = self._dequantise(embedding, rows), self._dequantise(output, rows)  # [rows, C] each
        return float((first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))) > COPY_COSINE

    def _less_precise_embedding(self) -> str:
        return min(("output.weight", "token_embd.weight"), key=self._bits_per_weight)

    def _bits_per_weight(self, name: str) -> float:
        if name not in self._tensors:
            return 0.0
        num_weights, num_bytes = GGML_QUANT_SIZES[self._tensors[name].tensor_type]
        return 8 * num_bytes / num_weights

    def _dequantise(self, tensor: ReaderTensor, rows: slice | np.ndarray) -> np.ndarray:
        try:
            return np.array(dequantize(tensor.data[rows], tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            kind = GGMLQuantizationType(tensor.tensor_type).name
            raise ValueError(
                f"{self.path}: {tensor.name} is quantised as {kind}, which cannot be dequantised; try a Q8_0 file."
            ) from error

    def _value(self, key: str, default: Any) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self._value(key, None)
        if value is None:
            raise ValueError(f"{self.path} has no {key}; the file is incomplete or of an unknown converter.")
        return value


def rename(name: str) -> str:
    """Return transformers' name of a GGUF tensor; an unknown name is returned as it is."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in LAYER_NAMES:
        return name
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
