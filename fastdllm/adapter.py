"""Gated low-rank updates of a frozen model: they act on the rows that hold the mask token and on no other.

So every clean row is computed as without them, to the bit. On disk an adapter is PEFT's two files, with a small third
one that says which base it belongs to and that it is gated, and a card for readers.
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastdllm.model import BlockDiffusionLM, RowGate
from fastdllm.runtime import replace_folder, write_text

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = Target.__args__
VALUES_CHECKED = 4096  # of each tensor
CONFIG_FILE, WEIGHTS_FILE, GATE_FILE, CARD_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "fastdllm.json",
    "README.md",
)
PEFT_PREFIX = "base_model.model."  # of every name in PEFT's files
PEFT_NAMES = {".reduce": ".lora_A.weight", ".expand": ".lora_B.weight"}
MASK_ROW, PEFT_MASK_ROW = "embed_tokens.trained", "embed_tokens.token_adapter.trainable_tokens_delta"
READ_KEYS = ("peft_type", "r", "lora_alpha", "target_modules", "trainable_token_indices")
# of adapter_config.json: say nothing about what is computed, or nothing without a key that is refused
PASSED_KEYS = ("base_model_name_or_path", "inference_mode", "init_lora_weights", "megatron_core", "peft_version")
PASSED_KEYS += ("qalora_group_size", "revision", "task_type", "lora_dropout")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Low-rank updates that act on mask rows alone."""

    rank: int = 64
    """Rank of each update, 1 or more."""
    alpha: float = 32.0
    """Updates are scaled by alpha / rank, above 0."""
    targets: list[Target] = field(default_factory=lambda: list(TARGETS))
    """Linear layers of every Qwen2 layer that get an update, at least one, each once."""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"adapter.rank must be 1 or more, got {self.rank}.")
        check_updates(self, "adapter")


def check_updates(settings: AdapterSettings, section: str) -> None:
    """Raise a ValueError, naming the section of the config, for a scale or targets that cannot be."""
    targets = settings.targets
    if settings.alpha <= 0:
        raise ValueError(f"{section}.alpha must be above 0, got {settings.alpha}.")
    if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(TARGETS):
        raise ValueError(f"{section}.targets must be different names among {', '.join(TARGETS)}, got {targets}.")


class GatedLinear(nn.Module):
    """A frozen linear layer and a low-rank update, which is added to the rows that the gate names."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, gate: RowGate):
        super().__init__()
        self.base, self.rank, self.alpha, self.gate = base, rank, alpha, gate
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.reduce = nn.Parameter(torch.empty(rank, base.in_features, **place))
        self.expand = nn.Parameter(torch.zeros(base.out_features, rank, **place))

    @property
    def weight(self) -> Tensor:
        """Raises a RuntimeError: no one matrix does what this layer does."""
        raise RuntimeError(
            "a linear layer with a gated adapter has no single weight: it depends on the row. Run the model's own "
            "layers (the engine: is_fused=False), or load the base without the adapter."
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return [..., out] for `rows` [..., in]; a row that the gate leaves out gets the base's, to the bit."""
        output = self.base(rows)
        if self.gate.rows is False:
            return output
        updated = output + self._update(rows).to(output.dtype)
        return updated if self.gate.rows is True else torch.where(self.gate.rows, updated, output)

    def _update(self, rows: Tensor) -> Tensor:
        reduced = F.linear(rows, self.reduce.to(rows.dtype)) * (self.alpha / self.rank)
        return F.linear(reduced, self.expand.to(reduced.dtype))


class MaskRowEmbedding(nn.Module):
    """A frozen embedding of which one row is trained, in float32; a tied LM head keeps the frozen row.

    That row of the head decides nothing: the mask token is never a target and is never proposed. peft's trainable
    tokens copy the whole matrix (0.5 GB at 1.5B) in every pass.
    """

    def __init__(self, base_layer: nn.Embedding, row: int):
        super().__init__()
        self.base_layer, self.row = base_layer, row
        self.trained = nn.Parameter(base_layer.weight[row].detach().to(torch.float32, copy=True))  # [C]

    @property
    def weight(self) -> Tensor:
        """[V, C], as frozen."""
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.base_layer(tokens)
        return torch.where((tokens == self.row)[..., None], self.trained.to(embedded.dtype), embedded)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the trained row into the matrix."""
        self.weight[self.row] = self.trained


def add_adapter(model: BlockDiffusionLM, settings: AdapterSettings, seed: int) -> None:
    """Freeze the model and put float32 updates, zero at first, into it in place; from now on its passes gate by row.

    Raises:
        ValueError: clean rows would see mask rows (context_attention block), or there is an adapter already.
    """
    if model.gate is not None:
        raise ValueError("the model has a gated adapter already; load the base again for another one.")
    if model.context_attention != "causal":
        raise ValueError(
            f"a gated adapter needs context_attention causal, got {model.context_attention}: only token by token are "
            "clean rows what the original model computes; start from an autoregressive checkpoint."
        )
    model.requires_grad_(False)
    gate, generator = RowGate(), torch.Generator().manual_seed(seed)
    for layer in model.qwen.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if name in settings.targets:
                    gated = GatedLinear(linear, settings.rank, settings.alpha, gate)
                    bound = 1 / math.sqrt(linear.in_features)  # as LoRA draws it
                    drawn = torch.empty(gated.reduce.shape).uniform_(-bound, bound, generator=generator)
                    gated.reduce.data.copy_(drawn)
                    setattr(part, name, gated)
    backbone = model.qwen.model
    backbone.embed_tokens = MaskRowEmbedding(backbone.embed_tokens, model.mask_token_id)
    model.gate = gate


def adapter_weights(model: BlockDiffusionLM) -> dict[str, nn.Parameter]:
    """Return the adapter's tensors under their names in `model.qwen`; empty without one."""
    if model.gate is None:
        return {}
    return {name: p for name, p in model.qwen.named_parameters() if name.endswith((*PEFT_NAMES, MASK_ROW))}


def num_adapter_parameters(qwen: nn.Module, settings: AdapterSettings) -> int:
    """Return how many values the updates and the mask token's embedding have for a Qwen2ForCausalLM, which may be
    without storage."""
    linears = [module for name, module in qwen.named_modules() if name.rsplit(".", 1)[-1] in settings.targets]
    width = qwen.get_parameter("model.embed_tokens.weight").shape[1]
    return settings.rank * sum(m.in_features + m.out_features for m in linears) + width


def values_checksum(tensors: Iterable[Tensor]) -> int:
    """Return the CRC-32 of about 4,096 evenly spaced values of every tensor, in bfloat16; 0 if there is none.

    In bfloat16, so that the same weights have one checksum however they were loaded (float16 loses the smallest).
    """
    checksum = 0
    for tensor in tensors:
        step = max(1, tensor.numel() // VALUES_CHECKED)
        values = tensor.detach().flatten()[::step].bfloat16().view(torch.int16)
        checksum = zlib.crc32(values.cpu().numpy().tobytes(), checksum)
    return checksum


def base_checksum(model: BlockDiffusionLM) -> int:
    """Return the checksum of the weights that are not the adapter's; the same with an adapter as without."""
    own = {id(parameter) for parameter in adapter_weights(model).values()}
    return values_checksum(parameter for parameter in model.parameters() if id(parameter) not in own)


def save_adapter(
    model: BlockDiffusionLM,
    folder: str | Path,
    *,
    base: str = "",
    facts: dict[str, str | int | float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter aside and rename it into place, replacing one that lies there.

    Args:
        base: hub id, or name, of the model that it belongs to.
        facts: what else readers shall know, such as data tokens; goes into the card and `fastdllm.json`.
    Raises:
        ValueError: the model has no adapter, or `folder` holds something that is none.
    """
    weights, settings = adapter_weights(model), _settings_of(model)
    folder = Path(folder)
    _check_replaceable(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _peft_config(settings, model.mask_token_id, base).save_pretrained(partial)
    tensors = {_peft_name(name): _peft_form(name, weight).to("cpu", dtype) for name, weight in weights.items()}
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / WEIGHTS_FILE).chmod((partial / CONFIG_FILE).stat().st_mode)  # safetensors leaves it to its owner alone
    gate = {"gate": "mask token", "mask_token_id": model.mask_token_id, "base": base}
    gate |= {"base_checksum": f"{base_checksum(model):08x}", **(facts or {})}
    write_text(partial / GATE_FILE, json.dumps(gate, indent=2) + "\n")
    write_text(partial / CARD_FILE, _card(gate))
    replace_folder(partial, folder)


def check_adapter(folder: str | Path, mask_token_id: int) -> list[Path]:
    """Return the files of an adapter that decide what it computes; reads no weights.

    Raises: what `load_adapter` does about them.
    """
    folder = Path(folder)
    _read_gate(folder)
    _read_settings(folder, mask_token_id)
    return [folder / CONFIG_FILE, folder / WEIGHTS_FILE]


def load_adapter(model: BlockDiffusionLM, folder: str | Path) -> None:
    """Put the adapter of a folder into the model, in the model's dtype and frozen; its passes then gate by row.

    Raises:
        FileNotFoundError: one of its files is missing.
        ValueError: it is of another kind, or belongs to another base, or its tensors do not fit.
    """
    folder = Path(folder)
    gate, settings = _read_gate(folder), _read_settings(folder, model.mask_token_id)
    if gate["base_checksum"] != f"{base_checksum(model):08x}":
        raise ValueError(
            f"{folder} belongs to a base ({gate['base'] or 'unnamed'}) with checksum {gate['base_checksum']}, and the "
            f"weights here have {base_checksum(model):08x}; load it onto the model that it was trained on."
        )
    tensors = load_file(folder / WEIGHTS_FILE)
    _check_tensors(tensors, model, settings, folder)
    add_adapter(model, settings, seed=0)
    for name, weight in adapter_weights(model).items():
        weight.data = tensors[_peft_name(name)].reshape(weight.shape).to(model.device, model.dtype)
        weight.requires_grad_(False)


def _settings_of(model: BlockDiffusionLM) -> AdapterSettings:
    gated = {name.rsplit(".", 1)[-1]: m for name, m in model.qwen.named_modules() if isinstance(m, GatedLinear)}
    if not gated:
        raise ValueError("the model has no gated adapter to save; add_adapter or load_adapter gives it one.")
    any_layer = next(iter(gated.values()))
    return AdapterSettings(rank=any_layer.rank, alpha=any_layer.alpha, targets=[t for t in TARGETS if t in gated])


def _peft_config(settings: AdapterSettings, mask_token_id: int, base: str) -> Any:
    from peft import LoraConfig  # seconds to import, for writing alone

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        trainable_token_indices={"embed_tokens": [mask_token_id]},
        base_model_name_or_path=base or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _peft_name(name: str) -> str:
    for ours, theirs in {**PEFT_NAMES, MASK_ROW: PEFT_MASK_ROW}.items():
        if name.endswith(ours):
            return PEFT_PREFIX + name.removesuffix(ours) + theirs
    raise AssertionError(f"{name} is no tensor of an adapter")


def _peft_form(name: str, weight: Tensor) -> Tensor:
    """PEFT keeps trained rows of an embedding as [rows, C], and whole, although it calls them a delta."""
    return weight.detach()[None] if name.endswith(MASK_ROW) else weight.detach()


def _check_replaceable(folder: Path) -> None:
    own = (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE, CARD_FILE)
    others = [path.name for path in folder.iterdir() if path.name not in own] if folder.is_dir() else []
    if others or folder.is_file():
        raise ValueError(
            f"{folder} holds {others[0] if others else 'a file'}, which is no part of an adapter, so it is not "
            "replaced; name another folder."
        )


def _read_gate(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, so it is no adapter in PEFT's format; name its folder.")
    if not (folder / GATE_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {GATE_FILE}, so its updates are not known to be gated by row; plain LoRA updates belong "
            "on all rows: merge them into the base with peft and convert the result."
        )
    return json.loads((folder / GATE_FILE).read_text())


def _read_settings(folder: Path, mask_token_id: int) -> AdapterSettings:
    config = json.loads((folder / CONFIG_FILE).read_text())
    known = (*READ_KEYS, *PASSED_KEYS)
    unread = [key for key, value in config.items() if key not in known and value not in (None, False, "none", {}, [])]
    if config.get("peft_type") != "LORA" or unread:
        found = f"{unread[0]} {config[unread[0]]!r}" if unread else f"peft_type {config.get('peft_type')!r}"
        raise ValueError(f"{folder / CONFIG_FILE} has {found}, which is not read here; only plain LoRA updates are.")
    if config.get("trainable_token_indices") != {"embed_tokens": [mask_token_id]}:
        raise ValueError(
            f"{folder / CONFIG_FILE} trains the embedding of tokens {config.get('trainable_token_indices')}, and the "
            f"model's mask token is {mask_token_id}; they do not belong together."
        )
    return AdapterSettings(rank=config["r"], alpha=config["lora_alpha"], targets=sorted(config["target_modules"]))


def _check_tensors(
    tensors: dict[str, Tensor], model: BlockDiffusionLM, settings: AdapterSettings, folder: Path
) -> None:
    shapes = {_peft_name(name): shape for name, shape in _expected_shapes(model, settings)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if different:
        first = different[0]
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not hold the updates that its config describes: {len(different)} tensors "
            f"differ, the first is {first}: {found.get(first, 'missing')} where {shapes.get(first, 'none')} is right."
        )


def _expected_shapes(model: BlockDiffusionLM, settings: AdapterSettings) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, linear in model.qwen.named_modules():
        if isinstance(linear, nn.Linear) and name.rsplit(".", 1)[-1] in settings.targets:
            yield f"{name}.reduce", (settings.rank, linear.in_features)
            yield f"{name}.expand", (linear.out_features, settings.rank)
    yield f"model.{MASK_ROW}", (1, model.qwen.config.hidden_size)


def _card(gate: dict[str, Any]) -> str:
    head = {"library_name": "peft", "tags": ["lora", "gated", "speculative-decoding"]}
    head |= {"base_model": gate["base"]} if "/" in gate["base"] else {}
    rows = "\n".join(f"| {name} | {value} |" for name, value in gate.items())
    return (
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---\n"
        "# Draft tokens for an untouched model\n\n"
        "Low-rank updates in PEFT's format that act **only on rows that hold the mask token** `|<MASK>|`, and that "
        "token's\nembedding (PEFT's trainable token). Clean rows get no update, so the base model verifies what the "
        "mask rows draft.\nPEFT reads these files, but adds the updates to all rows; `fastdllm` gates them by row.\n\n"
        "| | |\n|---|---|\n" + rows + "\n"
    )
