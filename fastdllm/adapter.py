"""Low-rank updates of a frozen model: their settings, the one trained row of an embedding, checksums of a base."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = Target.__args__
VALUES_CHECKED = 4096  # of each tensor


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


class MaskRowEmbedding(nn.Module):
    """A frozen embedding of which one row is trained, in float32; a tied LM head keeps the frozen row.

    That row of the head decides nothing: the mask token is never a target and is never proposed. peft's trainable
    tokens copy the whole matrix (0.5 GB at 1.5B) in every pass.
    """

    def __init__(self, base_layer: nn.Embedding, row: int):
        super().__init__()
        self.base_layer, self.row = base_layer, row
        self.trained = nn.Parameter(base_layer.weight[row].detach().float())  # [C]

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
