"""A block-diffusion language model: stock Qwen2 layers, our attention, our layer loop.

No modelling file is copied: transformers' Qwen2 layers take our attention mask and any cache with `update`.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from fastdllm.masks import ContextAttention

ATTENTION_NAME = "fastdllm"


class Cache(Protocol):
    """What the layers ask of a cache."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take the fresh [B, G, T, E] keys and values of a layer; return those to attend to, [B, G, S, E]."""


class LayerReuse(Protocol):
    """What the layer loop asks of layer reuse."""

    def recall(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return what stands in for running `layer` on `hidden` [B, T, C], or None: run it."""

    def store(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Keep what is needed of a layer that has just run; both are [B, T, C]."""


class BlockDiffusionLM(nn.Module):
    """Owns a Qwen2ForCausalLM and runs it layer by layer, always with an explicit attention mask and positions."""

    def __init__(
        self,
        qwen: Qwen2ForCausalLM,
        *,
        block_size: int = 32,
        mask_token_id: int,
        context_attention: ContextAttention = "block",
    ):
        super().__init__()
        self.qwen = qwen
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.context_attention = context_attention
        self.num_layers = qwen.config.num_hidden_layers
        self.layer_calls = 0  # layers really run since construction; reuse that skips nothing would show here
        AttentionInterface.register(ATTENTION_NAME, _attention)
        qwen.set_attn_implementation(ATTENTION_NAME)

    @property
    def device(self) -> torch.device:
        return self.qwen.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.qwen.model.embed_tokens.weight.dtype

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention_mask: Tensor | BlockMask,
        cache: Cache | None = None,
        reuse: LayerReuse | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm, [B, T, C].

        Args:
            tokens: [B, T] int64; positions: [B, T] int64, positions for the rotary angles.
            attention_mask: [B, 1, T, S] bool or BlockMask; never None.
        """
        backbone = self.qwen.model
        hidden = backbone.embed_tokens(tokens)
        if torch.is_autocast_enabled(hidden.device.type):  # keep the residual stream in the compute dtype
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        rotary = backbone.rotary_emb(hidden, positions)
        for index, layer in enumerate(backbone.layers):
            recalled = reuse.recall(index, hidden) if reuse is not None else None
            if recalled is not None:
                hidden = recalled
                continue
            before = hidden
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=cache)
            self.layer_calls += 1
            if reuse is not None:
                reuse.store(index, before, hidden)
        return backbone.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., V]; the mask token can never be proposed (its logit is -inf)."""
        logits = self.qwen.lm_head(hidden).float()
        logits[..., self.mask_token_id] = -torch.inf
        return logits


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **options
) -> tuple[Tensor, None]:
    """Attend with grouped keys and values kept grouped. query: [B, H, T, E]; key, value: [B, G, S, E]."""
    if attention_mask is None:
        raise ValueError("attention_mask must always be passed: without one, attention would silently be causal.")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary product is float32
    if isinstance(attention_mask, BlockMask):
        attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        output = attend(query, key, value, block_mask=attention_mask, scale=options["scaling"], enable_gqa=True)
    else:
        scale = options["scaling"]
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


_COMPILED = {}  # one compiled kernel per process, made on first use


def _compiled_flex_attention():
    if "flex" not in _COMPILED:
        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
    return _COMPILED["flex"]


def num_layer_parameters(config: Qwen2Config) -> int:
    """Return the weights of all matrix products of the layers (no embedding, no norms, no biases)."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head_size * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def forward_flops(
    config: Qwen2Config, num_rows: int, num_attention_pairs: int | Tensor, num_head_rows: int
) -> int | Tensor:
    """Return the floating-point operations of one forward pass; training needs three times as many.

    Args:
        num_rows: rows through the layers; num_head_rows: rows through the LM head.
        num_attention_pairs: (query, key) pairs that the attention mask allows, over all samples, of one layer and head.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * num_attention_pairs * config.num_attention_heads * head_size * config.num_hidden_layers
    head = 2 * num_head_rows * config.hidden_size * config.vocab_size
    return 2 * num_rows * num_layer_parameters(config) + attention + head
