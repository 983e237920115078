"""config.json of a checkpoint: what is read from stock, published and exported ones, and what is written.

Trap that this file exists for: transformers 5 writes `rope_parameters` and `dtype`, while the published Fast-dLLM v2
class reads top-level `rope_theta` (10000 if absent: silently wrong logits) and `torch_dtype`. Both are read; the
published spelling, which transformers 5 reads too, is written.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

STOCK_TYPE = "qwen2"
ADAPTED_TYPE = "Fast_dLLM_Qwen"
QWEN_VOCAB_SIZES = (151936, 152064)  # of Qwen2.5 up to 3B, and from 7B on
QWEN_END_OF_TURN_ID = 151645  # <|im_end|>
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
OPTIONAL_KEYS = (
    "num_key_value_heads",
    "hidden_act",
    "attention_dropout",
    "initializer_range",
    "max_window_layers",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What an adapted checkpoint remembers beside its weights; `fastdllm` in its config.json."""

    block_size: int = 32
    """Tokens generated together; a power of two."""
    first_token: Literal["noised", "clean"] = "noised"
    """Row that predicts a block's first token in training."""
    context_attention: Literal["block", "causal"] = "block"
    """How finished tokens attend to one another; causal keeps an exact autoregressive mode."""
    task: str = ""
    """lm-eval task to evaluate on by default; empty: none."""
    threshold: float = 0.9
    """Decoding default: confidence in (0, 1] above which a proposal is accepted."""
    sub_block_size: int = 8
    """Decoding default: tokens; divides `block_size`."""
    data_tokens: int = 0
    """Document tokens seen in adaptation; 0: not recorded."""
    base: str = ""
    """Name of the source model; empty: not recorded."""
    revision: str = ""
    """Commit of the code that adapted it; empty: not recorded."""

    def __post_init__(self):
        for name, values in (("first_token", ("noised", "clean")), ("context_attention", ("block", "causal"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}; try 32.")
        if self.sub_block_size < 1 or self.block_size % self.sub_block_size:
            raise ValueError(f"sub_block_size must divide block_size ({self.block_size}), got {self.sub_block_size}.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}.")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the keys of the folder's config.json.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json; an HF folder needs one.")
    return json.loads(path.read_text())


def qwen_arguments(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the arguments of transformers' `Qwen2Config` for a stock, published or exported config.json.

    Raises:
        ValueError: another architecture, a missing key, sliding windows or scaled RoPE; it names `source`.
    """
    kind = raw.get("model_type")
    if kind not in (STOCK_TYPE, ADAPTED_TYPE):
        raise ValueError(f"{source} is of model_type {kind!r}; only {STOCK_TYPE} and {ADAPTED_TYPE} are supported.")
    missing = [key for key in REQUIRED_KEYS if key not in raw]
    if missing:
        raise ValueError(f"{source}: config.json lacks {', '.join(missing)}.")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
        raise ValueError(f"{source} uses sliding-window attention, which is not supported; use a full-attention model.")
    if raw.get("attention_dropout"):
        raise ValueError(
            f"{source} has attention_dropout {raw['attention_dropout']}, which is not supported; set it to 0."
        )
    head_size = raw["hidden_size"] // raw["num_attention_heads"]
    if raw.get("head_dim", head_size) != head_size:
        raise ValueError(f"{source}: head_dim must be hidden_size / num_attention_heads = {head_size}.")
    known = {key: raw[key] for key in REQUIRED_KEYS + OPTIONAL_KEYS if key in raw}
    return known | {"rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(raw, source)}}


def _rope_theta(raw: dict[str, Any], source: str) -> float:
    """Return the RoPE base from either spelling: the published top-level one or that of transformers 5."""
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{source} scales RoPE ({kind}), which is not supported; remove it from config.json.")
    bases = {float(part["rope_theta"]) for part in (raw, parameters) if part.get("rope_theta") is not None}
    if len(bases) != 1:
        found = " and ".join(map(str, sorted(bases))) or "none"
        raise ValueError(f"{source}: config.json must name one RoPE base (rope_theta), got {found}.")
    return bases.pop()


def adaptation_of(raw: dict[str, Any], source: str) -> Adaptation | None:
    """Return what an adapted checkpoint remembers; None for a stock config.

    Raises:
        ValueError: `bd_size` is absent or contradicted, or a key is unknown; it names `source`.
    """
    if raw.get("model_type") != ADAPTED_TYPE:
        return None
    if "bd_size" not in raw:
        raise ValueError(f"{source}: config.json lacks bd_size, the block size of a {ADAPTED_TYPE} checkpoint.")
    block_size = raw["bd_size"]
    remembered = raw.get("fastdllm", {"block_size": block_size, "sub_block_size": min(8, block_size)})
    unknown = set(remembered) - {field.name for field in fields(Adaptation)}
    if unknown:
        raise ValueError(
            f"{source}: unknown keys in config.json's fastdllm: {', '.join(sorted(unknown))}; update the code."
        )
    adaptation = Adaptation(**remembered)
    if adaptation.block_size != block_size:
        raise ValueError(f"{source}: bd_size is {block_size} but fastdllm.block_size {adaptation.block_size}.")
    return adaptation


def stock_config(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a Qwen2 config.json for `Qwen2Config` arguments; transformers 4 and 5 both read its spelling."""
    return {key: arguments[key] for key in REQUIRED_KEYS + OPTIONAL_KEYS} | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": STOCK_TYPE,
        "rope_theta": arguments["rope_parameters"]["rope_theta"],
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * arguments["num_hidden_layers"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.53.1",  # of the published checkpoints: the version whose spelling this is
        "use_cache": True,
    }


def adapted_config(
    arguments: dict[str, Any], dtype: torch.dtype, *, eos_token_id: int, mask_token_id: int, adaptation: Adaptation
) -> dict[str, Any]:
    """Return the config.json of the published checkpoints key by key, with `mask_token_id` and `fastdllm` beside."""
    is_qwen = arguments["vocab_size"] in QWEN_VOCAB_SIZES
    return stock_config(arguments, dtype) | {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "model_type": ADAPTED_TYPE,
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": adaptation.block_size,
        "eos_token_id": eos_token_id,
        "pad_token_id": QWEN_END_OF_TURN_ID if is_qwen else eos_token_id,
        "mask_token_id": mask_token_id,
        "fastdllm": asdict(adaptation),
    }
