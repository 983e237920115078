"""A block-diffusion language model: stock Qwen2 layers, our attention, our layer loop.

No modelling file is copied: transformers' Qwen2 layers take our attention mask and any cache with `update`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, rotate_half

from fastdllm.masks import ContextAttention

Recompute = Literal["none", "selective", "full"]
ATTENTION_NAME = "fastdllm"
# FlexAttention's tiles by head size, where its own choice is not the fastest: at 64 (0.5B, 8 x 6,144 rows, one H100)
# 0.74 and 2.09 ms forward and backward against 1.03 and 2.33 ms. At 128 nothing tried was faster.
FLEX_TILES = {
    64: {
        **{"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
        **{"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64},
        **{"bwd_num_warps": 4, "bwd_num_stages": 3},
    }
}


class Cache(Protocol):
    """What the layers ask of a cache."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take the fresh [B, G, T, E] keys and values of a layer; return those to attend to, [B, G, S, E]."""


Branch = Callable[[Tensor], Tensor]  # [B, T, C] -> what attention, or the MLP, adds to it


class LayerReuse(Protocol):
    """What the layer loop asks of layer reuse."""

    def run(self, layer: int, hidden: Tensor, attend: Branch, transform: Branch) -> Tensor:
        """Return the layer's output [B, T, C], calling its branches or putting something kept in their place."""


class ChosenRows(NamedTuple):
    """The rows whose final hidden states are wanted."""

    index: Tensor
    """[B, T] int64 into the rows of the pass."""
    attention_mask: Tensor | BlockMask
    """What they attend to: [B, 1, T, S] bool or BlockMask."""


class RowGate:
    """Says on which rows of the present pass an adapter acts; holds until the next one, through the backward pass."""

    rows: Tensor | bool = False
    """[B, T, 1] bool; or all rows (True), or none (False), which costs nothing."""


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
        self.run_last_layer = run_last_layer  # training puts its form here
        self.gate: RowGate | None = None  # of a gated adapter (adapter.py), which acts on mask rows alone
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
        chosen: ChosenRows | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm, [B, T, C]; of the chosen rows alone, if there are any.

        Args:
            tokens: [B, T] int64; positions: [B, T] int64, positions for the rotary angles.
            attention_mask: [B, 1, T, S] bool or BlockMask; never None.
            chosen: the last layer then gives the other rows keys and values and nothing else.
        """
        if chosen is not None and cache is not None:
            raise ValueError("chosen rows are for training: the last layer would not fill the cache.")
        hidden, rotary = self.embed(tokens, positions)
        layers = range(self.num_layers)
        return self.norm(self.run_layers(layers, hidden, rotary, attention_mask, cache, reuse, chosen))

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the first layer's input [B, T, C] and the rotary angles' cosines and sines, [B, T, E] each.

        A pass begins here, so a gated adapter learns here which rows are its own.
        """
        if self.gate is not None:
            self.gate.rows = (tokens == self.mask_token_id)[..., None]
        hidden = self.qwen.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(hidden.device.type):  # keep the residual stream in the compute dtype
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return hidden, self.qwen.model.rotary_emb(hidden, positions)

    def run_layers(
        self,
        layers: range,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | BlockMask,
        cache: Cache | None = None,
        reuse: LayerReuse | None = None,
        chosen: ChosenRows | None = None,
    ) -> Tensor:
        """Return what `layers`, one after the other, make of `hidden` [B, T, C]; the rest is as in `hidden_states`."""
        for index in layers:
            layer = self.qwen.model.layers[index]
            if reuse is not None:
                attend = partial(_attention_branch, layer, attention_mask, rotary, cache)
                hidden = reuse.run(index, hidden, attend, partial(self._mlp_branch, layer))
                continue
            if chosen is not None and index == self.num_layers - 1:
                hidden = self.run_last_layer(layer, hidden, rotary, chosen)
            else:
                hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=cache)
            self.layer_calls += 1
        return hidden

    def _mlp_branch(self, layer: Qwen2DecoderLayer, hidden: Tensor) -> Tensor:
        self.layer_calls += 1
        return layer.mlp(layer.post_attention_layernorm(hidden))

    def use_training_form(self, recompute: Recompute, is_compiled: bool) -> None:
        """Run all layers in their form for training (`training_form`) from now on.

        A layer takes it inside its call, not around it, the last one for chosen rows too. FSDP2 and ZeRO-3 gather a
        layer's weights in hooks of its call, and a hook inside a graph would break it.
        """
        layers = self.qwen.model.layers
        whole = training_form(Qwen2DecoderLayer.forward, recompute, is_compiled)  # one, so that all share its graph
        for layer in layers:
            layer.forward = partial(whole, layer)
        some_rows = training_form(run_last_layer, recompute, is_compiled)
        layers[-1].forward = partial(_last_forward, partial(whole, layers[-1]), partial(some_rows, layers[-1]))
        self.run_last_layer = _call_last_layer

    def norm(self, hidden: Tensor) -> Tensor:
        """Return the hidden states after the final norm, in the dtype of the last layer's output."""
        return self.qwen.model.norm(hidden).to(hidden.dtype)  # float32 weights under autocast would make it float32

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., V]; the mask token can never be proposed (its logit is -inf)."""
        logits = self.qwen.lm_head(hidden).float()
        logits[..., self.mask_token_id] = -torch.inf
        return logits


def _attention_branch(layer: Qwen2DecoderLayer, attention_mask, rotary, cache: Cache | None, hidden: Tensor) -> Tensor:
    normed = layer.input_layernorm(hidden)
    return layer.self_attn(
        hidden_states=normed, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=cache
    )[0]


class KeyValues(NamedTuple):
    """What attention reads of some rows."""

    key: Tensor
    """[B, G, T, E], turned by the rotary angles."""
    value: Tensor
    """[B, G, T, E]."""


def run_last_layer(
    layer: Qwen2DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor], chosen: ChosenRows
) -> Tensor:
    """Return the output of the chosen rows [B, T, C], with all rows [B, R, C] as keys and values.

    The same submodules as the layer's own forward pass, with queries and everything after them on the chosen rows.
    """
    normed = layer.input_layernorm(hidden)
    seen = _keys_and_values(layer, normed, rotary)
    chosen_rotary = tuple(_rows(angles, chosen.index) for angles in rotary)
    queried = _rows(normed, chosen.index)
    return _finish(layer, _rows(hidden, chosen.index), queried, chosen_rotary, seen, chosen.attention_mask)


def run_rows(
    layer: Qwen2DecoderLayer,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    attention_mask: Tensor | BlockMask,
    context: KeyValues | None = None,
) -> tuple[Tensor, KeyValues]:
    """Return the layer's output of rows [B, T, C], and their keys and values.

    They attend to those of `context`, S rows, and behind them to their own: `attention_mask` is over S + T keys.
    """
    normed = layer.input_layernorm(hidden)
    own = _keys_and_values(layer, normed, rotary)
    seen = own
    if context is not None:
        seen = KeyValues(*(torch.cat(pair, dim=2) for pair in zip(context, own, strict=True)))
    return _finish(layer, hidden, normed, rotary, seen, attention_mask), own


def keys_and_values(layer: Qwen2DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValues:
    """Return the keys and values alone that the layer makes of rows [B, T, C]."""
    return _keys_and_values(layer, layer.input_layernorm(hidden), rotary)


def _keys_and_values(layer: Qwen2DecoderLayer, normed: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValues:
    attention = layer.self_attn
    value = _heads(attention, attention.v_proj(normed))
    key = _rotate(_heads(attention, attention.k_proj(normed)), *rotary)
    return KeyValues(key.to(value.dtype), value)  # under autocast the rotary product is float32


def _finish(layer, hidden: Tensor, normed: Tensor, rotary, seen: KeyValues, attention_mask) -> Tensor:
    """Return the layer's output of rows [B, T, C] that attend to `seen`; `normed` are they after the first norm."""
    attention = layer.self_attn
    query = _rotate(_heads(attention, attention.q_proj(normed)), *rotary)
    attended, _ = _attention(attention, query, *seen, attention_mask, scaling=attention.scaling)
    output = hidden + attention.o_proj(attended.flatten(-2))
    return output + layer.mlp(layer.post_attention_layernorm(output))


def _call_last_layer(
    layer: Qwen2DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor], chosen: ChosenRows
) -> Tensor:
    return layer(hidden, position_embeddings=rotary, chosen=chosen)


def _last_forward(
    whole: Callable, some_rows: Callable, hidden: Tensor, chosen: ChosenRows | None = None, **options
) -> Tensor:
    """Run the last layer in one of its two training forms: on all rows, or for the chosen ones."""
    if chosen is None:
        return whole(hidden, **options)
    return some_rows(hidden, options["position_embeddings"], chosen)


def _heads(attention: nn.Module, projected: Tensor) -> Tensor:
    """Return [B, T, H * E] as [B, H, T, E]."""
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` [B, T] of `values` [B, R, C], or [1, R, C] for all samples: [B, T, C]."""
    values = values.expand(len(index), -1, -1)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return `heads` [B, H, T, E] turned by the rotary angles, whose cosines and sines are [B, T, E]."""
    return heads * cosine[:, None] + rotate_half(heads) * sine[:, None]


def training_form(function: Callable, recompute: Recompute, is_compiled: bool) -> Callable:
    """Return a layer's forward pass, or `run_last_layer`, in the form for training.

    Args:
        recompute: what the backward pass works out again instead of keeping it: nothing, all but the outputs of matrix
            products and of attention ("selective"), or the whole layer ("full").
        is_compiled: into one graph; what would run uncompiled (a break, too many recompilations) is an error of dynamo.
    """
    options = {"context_fn": _selective_contexts} if recompute == "selective" else {}

    def checkpointed(*arguments, **named):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **options, **named)

    form = function if recompute == "none" else checkpointed
    return torch.compile(form, dynamic=False, fullgraph=True) if is_compiled else form


def _selective_contexts():
    return create_selective_checkpoint_contexts(_is_kept)


def _is_kept(context, operator, *inputs, **options) -> CheckpointPolicy:
    is_costly = any(part in str(operator) for part in ("mm", "attention"))
    return CheckpointPolicy.MUST_SAVE if is_costly else CheckpointPolicy.PREFER_RECOMPUTE


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **options
) -> tuple[Tensor, None]:
    """Attend; query is [B, H, T, E], key and value are [B, G, S, E] and stay grouped for SDPA."""
    if attention_mask is None:
        raise ValueError("attention_mask must always be passed: without one, attention would silently be causal.")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary product is float32
    if isinstance(attention_mask, BlockMask):
        # Grouped keys would keep few thread blocks busy in the backward pass, the longest of them with the early clean
        # rows, which everybody reads: 2.33 ms grouped, 1.44 ms repeated (1.5B shape, 3 x 6,144 rows, one H100).
        repeats = query.shape[1] // key.shape[1]
        key, value = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (key, value))
        attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        tiles = FLEX_TILES.get(query.shape[-1]) if query.dtype.itemsize == 2 else None
        output = attend(query, key, value, block_mask=attention_mask, scale=options["scaling"], kernel_options=tiles)
    else:
        scale = options["scaling"]
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@cache
def compiled_flex_attention() -> Callable:
    """Return FlexAttention compiled by itself, for layers that are not."""
    return torch.compile(flex_attention, dynamic=False)


class PassSize(NamedTuple):
    """What a forward pass computes, over all samples."""

    num_rows: int
    """Rows through all layers but the last, and through the last one's keys and values."""
    num_last_rows: int
    """Rows through the rest of the last layer."""
    num_pairs: int | Tensor
    """(query, key) pairs that attention allows in a layer, for one head."""
    num_last_pairs: int | Tensor
    """The same in the last layer."""
    num_head_rows: int
    """Rows through the LM head."""


def num_layer_parameters(config: Qwen2Config) -> int:
    """Return the weights of all matrix products of the layers (no embedding, no norms, no biases)."""
    return config.num_hidden_layers * (_key_value_weights(config) + _other_weights(config))


def forward_flops(config: Qwen2Config, size: PassSize) -> int | Tensor:
    """Return the floating-point operations of one forward pass; training needs three times as many."""
    key_value, other = _key_value_weights(config), _other_weights(config)
    earlier = config.num_hidden_layers - 1
    products = size.num_rows * (earlier * (key_value + other) + key_value) + size.num_last_rows * other
    pairs = earlier * size.num_pairs + size.num_last_pairs
    attention = 4 * pairs * config.num_attention_heads * _head_size(config)
    return 2 * (products + size.num_head_rows * config.hidden_size * config.vocab_size) + attention


def _head_size(config: Qwen2Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _key_value_weights(config: Qwen2Config) -> int:
    return 2 * config.hidden_size * _head_size(config) * config.num_key_value_heads


def _other_weights(config: Qwen2Config) -> int:
    """Return the weights of one layer's query, output and MLP products."""
    attention = 2 * config.hidden_size * _head_size(config) * config.num_attention_heads
    return attention + 3 * config.hidden_size * config.intermediate_size
