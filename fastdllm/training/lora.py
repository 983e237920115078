"""Low-rank updates of a frozen model (LoRA, through peft), and their way back into dense weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdllm.adapter import AdapterSettings, MaskRowEmbedding, check_updates, num_adapter_parameters, values_checksum
from fastdllm.model import BlockDiffusionLM


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdapterSettings):
    """Train low-rank updates and the mask token's embedding instead of all weights; for small GPUs."""

    rank: int = 0
    """Rank of each update, 0 or more; 0 trains all weights. The frozen ones are kept in the compute precision."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (train all weights) or more, got {self.rank}.")
        check_updates(self, "lora")
        if not self.rank and (self.alpha, self.targets) != (AdapterSettings().alpha, AdapterSettings().targets):
            raise ValueError(
                "lora.alpha and lora.targets do nothing with lora.rank 0; set lora.rank, or leave them out."
            )


def add_lora(model: BlockDiffusionLM, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and put float32 updates, zero at first, into it in place; the module tree stays Qwen2's."""
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import, for these runs only

    adapter = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, model.qwen)
    backbone = model.qwen.model
    backbone.embed_tokens = MaskRowEmbedding(backbone.embed_tokens, model.mask_token_id)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def frozen_checksum(model: nn.Module) -> int:
    """Return the checksum of all frozen tensors; 0 if none is frozen."""
    return values_checksum(parameter for parameter in model.parameters() if not parameter.requires_grad)


def merged_weights(model: BlockDiffusionLM, trained: dict[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """Return the dense weights, under Qwen2's names, of a float32 source model, which is changed, with its updates.

    Raises:
        ValueError: `trained` are not the updates that `settings` describe.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    add_lora(model, settings, seed=0)
    qwen = model.qwen
    expected = {name for name, parameter in qwen.named_parameters() if parameter.requires_grad}
    if expected != trained.keys():
        different = sorted(expected ^ trained.keys())
        raise ValueError(f"The checkpoint does not hold the updates of lora.targets; the first unlike: {different[0]}.")
    qwen.load_state_dict(trained, strict=False)
    for module in list(qwen.modules()):
        if isinstance(module, BaseTunerLayer | MaskRowEmbedding):
            module.merge()
    return {
        name.replace(".base_layer.", "."): weight for name, weight in qwen.state_dict().items() if name not in expected
    }


def num_lora_parameters(qwen: nn.Module, settings: LoraSettings) -> int:
    """Return how many values are trained in a Qwen2ForCausalLM, which may be without storage; 0 without LoRA."""
    return num_adapter_parameters(qwen, settings) if settings.rank else 0
