"""The model arguments of the lm-eval adapter: names, types, defaults, and what they ask of the decoder."""

import difflib
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import torch

from fastdllm.checkpoint import Checkpoint
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.policies import VERIFIED, PolicyName
from fastdllm.decoding.reuse import ActiveRows, ReuseConfig, ReuseMode, Schedule
from fastdllm.runtime import get_optimal_dtype

READ_BY_LIKELIHOOD = ("model_path", "device", "dtype", "batch_size", "mask_id", "bd_size", "mode", "prompt")
READ_BY_LIKELIHOOD += ("experiment_name", "show_speed")


@dataclass(frozen=True, kw_only=True)
class HarnessArguments:
    """The model arguments, under their published names and with their published defaults, then ours."""

    model_path: str = "Efficient-Large-Model/Fast_dLLM_v2_7B"
    """Hub id, HF folder or .gguf file."""
    adapter: str = ""
    """Folder of a gated adapter in PEFT's format, for policy verified; empty: none."""
    device: str = "auto"
    """auto (cuda, the published default, where there is one), cpu, cuda or cuda:N."""
    show_speed: bool = False
    """Print tokens, seconds and tokens/s after each set of requests."""
    max_new_tokens: int = 2048
    """Most new tokens of an answer; a task's own limit holds when it is lower."""
    batch_size: int = 32
    """Problems decoded together."""
    mask_id: int = 0
    """Mask token id; 0: the checkpoint's (151665 in published ones). Another id than the checkpoint's is an error."""
    use_block_cache: bool = False
    """Switches the sub-block cache."""
    small_block_size: int = 8
    """Sub-block size in tokens."""
    bd_size: int = 0
    """Block size; 0: the checkpoint's (32 in published ones). Another size than the checkpoint's is an error."""
    threshold: float = 0.9
    """Confidence in (0, 1] above which a proposal is accepted."""
    policy: PolicyName = "threshold"
    """Which proposals are accepted; verified: those that the model chooses token by token."""
    policy_parameter: float = 0.0
    """The number of policies other than threshold; 0: the policy's default."""
    fuse_append: bool = False
    """Compute the next block's first step together with the append."""
    draft_length: int = 7
    """Policy verified: drafts of a pass; 0: chosen while decoding."""
    draft_groups: str = "all"
    """Policy verified: numbers of accepted drafts for which the next are made: all, or joined by + such as 0+4+8."""
    reuse_k: int = 1
    """Refresh every k-th denoising step; 1: no reuse."""
    layer_subset: str = "first"
    """Layers that may reuse: first, middle, last, or indices joined by + such as 4+5+6."""
    experiment_name: str = ""
    """A name that lm-eval writes beside its results."""
    reuse_mode: ReuseMode = "output"
    """What stands in for a reused layer."""
    schedule: Schedule = "fixed"
    """fixed: refreshes by reuse_k; adaptive: by how much has changed, against budget."""
    budget: float = 0.0
    """Schedule adaptive: the summed relative change up to which layers are reused, 0 or more."""
    active_rows: ActiveRows = "all"
    """Rows that a sub-block step computes; needed: only those that can change (not with reused layers)."""
    mode: Literal["auto", "ar", "diffusion"] = "auto"
    """auto: diffusion for adapted checkpoints, ar for others."""
    engine: Literal["fastdllm", "transformers"] = "fastdllm"
    """transformers: its own generation loop, in mode ar only."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 0.95
    """Nucleus for temperature above 0."""
    prompt: Literal["published", "lm_eval"] = "published"
    """published: the answer cue of gsm8k and minerva_math is replaced by an instruction (method.md 4)."""
    dtype: str = "auto"
    """auto (by device), float32, float16 or bfloat16."""
    seed: int = 0
    """Seed of sampling; problem i draws from seed + i."""

    @property
    def decode(self) -> DecodeConfig:
        """How blocks are unmasked."""
        return DecodeConfig(
            sub_block_size=self.small_block_size,
            policy=self.policy,
            threshold=self.threshold,
            policy_parameter=self.policy_parameter,
            fuse_append=self.fuse_append,
            draft_length=self.draft_length,
            draft_groups=self.draft_groups.replace("+", ","),
            use_block_cache=self.use_block_cache,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    @property
    def reuse(self) -> ReuseConfig:
        """What is reused, and when."""
        return ReuseConfig(
            reuse_k=self.reuse_k,
            schedule=self.schedule,
            budget=self.budget,
            subset=self.layer_subset.replace("+", ","),
            reuse_mode=self.reuse_mode,
            active_rows=self.active_rows,
        )


def unused_by_likelihood(options: list[str]) -> str:
    """Return the message for options that a log-likelihood task does not read."""
    return (
        f"a log-likelihood task generates nothing, so it cannot exercise {', '.join(options)}; leave out, or choose a "
        "task that generates."
    )


def parse_arguments(arguments: dict[str, Any]) -> HarnessArguments:
    """Return the typed arguments. Raises ValueError for an unknown name, with the nearest known one."""
    known = [field.name for field in fields(HarnessArguments)]
    for name in arguments:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}."
            raise ValueError(f"unknown model argument {name}; {hint}")
    if arguments.get("layer_subset", "") is None:  # the seed study's spelling of its default
        arguments = {**arguments, "layer_subset": "first"}
    inert = sorted({"small_block_size", "use_block_cache"} & arguments.keys())
    if arguments.get("policy") == VERIFIED and inert:
        raise ValueError(
            f"model argument {inert[0]} does nothing with policy {VERIFIED}, which has no blocks; leave it out."
        )
    typed = {name: _typed(name, value) for name, value in arguments.items()}
    return HarnessArguments(**typed)


def _typed(name: str, value: Any) -> Any:
    """Return a model argument in the type of its field. Raises ValueError for a value that it cannot be."""
    kind = get_type_hints(HarnessArguments)[name]
    choices = get_args(kind) or ((True, False) if kind is bool else ())
    try:
        value = value if choices else kind(value)
    except ValueError:
        raise ValueError(f"model argument {name} must be a {kind.__name__}, got {value!r}.") from None
    if choices and value not in choices:
        raise ValueError(f"model argument {name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
    return value


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; "auto" is the device's best. Raises ValueError for an unknown name."""
    choices = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name != "auto" and name not in choices:
        raise ValueError(f"dtype must be auto, {', '.join(choices)}, got {name!r}.")
    return get_optimal_dtype(device)[0] if name == "auto" else choices[name]


def resolve_mode(mode: str, checkpoint: Checkpoint) -> str:
    """Return "ar" or "diffusion". Raises ValueError for diffusion on a checkpoint that was never adapted."""
    is_adapted = checkpoint.adaptation is not None or bool(checkpoint.adapter)
    if mode == "diffusion" and not is_adapted:
        raise ValueError(
            f"mode diffusion needs an adapted checkpoint, got the autoregressive {checkpoint.source}; adapt it with "
            "train.py, use mode ar, or give an adapter that drafts for it."
        )
    return ("diffusion" if is_adapted else "ar") if mode == "auto" else mode
