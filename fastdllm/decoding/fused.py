"""The decode-time forward pass: merged weights, fused kernels, static shapes, no word with the host."""

from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdllm.adapter import GatedLinear, MaskRowEmbedding
from fastdllm.decoding import operations
from fastdllm.decoding.cache import SlotCache, head_size
from fastdllm.decoding.drafts import MOST_DRAFTS
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.operations import HeadStatistics, PassRows, has_kernels_for
from fastdllm.decoding.policies import Proposals
from fastdllm.decoding.reuse import LayerStore
from fastdllm.decoding.updates import NO_UPDATES, LayerUpdates, LowRankUpdate, layer_updates
from fastdllm.model import BlockDiffusionLM


class Operations(Protocol):
    """What a pass is made of; `operations` says what each does, in plain torch."""

    def multiply(self, rows: Tensor, weight: Tensor, update: LowRankUpdate | None = None) -> Tensor: ...

    def multiply_gated(self, rows: Tensor, weight: Tensor, update: LowRankUpdate | None = None) -> Tensor: ...

    def normalize(
        self, hidden: Tensor, parts: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]: ...

    def rotate_and_store(
        self, parts: Tensor, bias: Tensor, angles: Tensor, rows: PassRows, keys: Tensor, values: Tensor
    ) -> Tensor: ...

    def attend_slots(self, query: Tensor, keys: Tensor, values: Tensor, rows: PassRows) -> Tensor: ...

    def head_statistics(self, hidden: Tensor, head: Tensor, banned: int) -> HeadStatistics: ...


class FusedLayer(NamedTuple):
    """The weights of a layer, [out, in] as in nn.Linear."""

    input_norm: Tensor
    query_key_value: Tensor
    """[(H + 2G) * E, C]."""
    query_key_value_bias: Tensor
    output: Tensor
    middle_norm: Tensor
    gate_up: Tensor
    """[2 * intermediate, C], the gate first."""
    down: Tensor


class FusedForward:
    """Runs a BlockDiffusionLM's layers over rows of slots; promises the hidden states of `model.hidden_states`.

    Merged weights are new tensors, one layer at a time; the model's own parameters become views of them, so that no
    weight is kept twice and the model still works. Build it when the model is where it stays, in the dtype that it
    stays in: a model moved or trained afterwards has other weights. Only the rotary table is new: 8 bytes for each
    position and half a head (16 MiB for 32,768 positions at head size 128).

    A gated adapter's updates are copied, in the model's dtype (2 bytes a value in half precision), and added to the
    rows that hold the mask token; other rows are what they are without it, to the bit.
    """

    def __init__(
        self,
        model: BlockDiffusionLM,
        kernels: Operations | ModuleType | None = None,
        *,
        max_few_rows: int = 256,
    ):
        """Take `kernels` (None: Triton's on a GPU, plain torch elsewhere) for passes of up to `max_few_rows` rows.

        Above that, torch's own products are faster, and replace those of `kernels`.

        Raises:
            ValueError: the model's layers are not known (`can_fuse`).
        """
        if not can_fuse(model):
            raise ValueError(
                "the fused pass merges plain linear layers and those of a gated adapter, and this model has others; "
                "run its own layers (is_fused false)."
            )
        backbone = model.qwen.model
        self.model, self.kernels = model, kernels or default_kernels(model.device)
        self.max_few_rows = max_few_rows
        self.mask_token_id = model.mask_token_id
        self.epsilon = model.qwen.config.rms_norm_eps
        self._embedding, self._head = backbone.embed_tokens.weight.detach(), model.qwen.lm_head.weight.detach()
        self._final_norm = backbone.norm.weight.detach()
        self._layers = [_fuse(layer) for layer in backbone.layers]
        embedding, self._mask_row, self._updates = backbone.embed_tokens, None, None
        if model.gate is not None:
            self._mask_row = embedding.trained.detach().to(model.dtype)  # [C]; the head keeps the frozen one
            self._updates = [layer_updates(layer) for layer in backbone.layers]
        self._all = range(len(self._layers))
        self._most_places = model.qwen.config.max_position_embeddings
        # rows of a block, or drafts, that end behind the capacity have positions too; nobody reads what they give
        beyond = 2 * max(model.block_size, MOST_DRAFTS)
        positions = torch.arange(self._most_places + beyond, device=model.device)
        cosine, sine = backbone.rotary_emb(torch.empty(0, device=model.device), positions[None])  # float32 [1, P, E]
        self._angles = torch.stack([x[0, :, : x.shape[-1] // 2] for x in (cosine, sine)]).detach().contiguous()

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        rows: PassRows,
        cache: SlotCache,
        reuse: LayerStore | None = None,
        *,
        layers: range | None = None,
        before: Tensor | None = None,
        is_clean: bool = False,
    ) -> Tensor:
        """Return the hidden states after the last layer, [B, T, C]; write keys and values into the cache.

        Args:
            tokens: [B, T] int64; limits of the rows may be above the capacity.
            reuse: its layers see whole hidden states, and so cost a few small kernels more where they do run.
            layers: those that are run; None for all. The final norm follows the model's last one alone.
            before: [B, T, C], what goes into the first of them; None for the embedded tokens.
            is_clean: no row that anyone reads holds the mask token, so no update is computed.
        Raises:
            ValueError: the cache has places for which there is no rotary angle.
        """
        if cache.capacity > self._most_places:
            raise ValueError(
                f"the cache has {cache.capacity} places, the model's max_position_embeddings is {self._most_places}; "
                "take a smaller capacity."
            )
        rows = rows._replace(limits=rows.limits.clamp(max=cache.capacity))
        rows = PassRows(*(None if tensor is None else tensor.contiguous() for tensor in rows))
        gate = None if self._updates is None or is_clean else (tokens == self.mask_token_id).reshape(-1, 1)  # [R, 1]
        before = self._embed(tokens, gate) if before is None else before
        layers = self._all if layers is None else layers
        hidden, parts = before.flatten(0, 1).contiguous(), None  # [R, C]; parts [P, R, C], to be added
        for index in layers:
            updates = NO_UPDATES if gate is None else self._updates[index].gated(gate)
            if reuse is None or index not in reuse.layers:
                attended = self._attend(index, hidden, parts, rows, cache, updates)
                hidden, parts = self._transform(index, *attended, updates)
                continue
            if parts is not None:
                hidden, parts = hidden + parts.sum(0).to(hidden.dtype), None

            def attend(hidden: Tensor, index: int = index, updates: LayerUpdates = updates) -> Tensor:
                added = self._attend(index, hidden.flatten(0, 1), None, rows, cache, updates)[1]
                return added.sum(0).to(hidden.dtype).view_as(hidden)

            def transform(hidden: Tensor, index: int = index, updates: LayerUpdates = updates) -> Tensor:
                added = self._transform(index, hidden.flatten(0, 1), None, updates)[1]
                return added.sum(0).to(hidden.dtype).view_as(hidden)

            hidden = reuse.run(index, hidden.view(*tokens.shape, -1), attend, transform).flatten(0, 1)
        if layers.stop == len(self._layers):
            hidden = self.kernels.normalize(hidden, parts, self._final_norm, self.epsilon)[1]
        elif parts is not None:
            hidden = hidden + parts.sum(0).to(hidden.dtype)
        return hidden.view(*tokens.shape, -1)

    @torch.no_grad()
    def statistics(self, hidden: Tensor) -> HeadStatistics:
        """Return what the logits of hidden [R, C], which may be a view, say, without the mask token."""
        return self.kernels.head_statistics(hidden.contiguous(), self._head, self.mask_token_id)

    def _embed(self, tokens: Tensor, gate: Tensor | None) -> Tensor:
        """Return the embedded tokens [B, T, C]; those of `gate` [R, 1] bool are the adapter's mask row."""
        embedded = F.embedding(tokens, self._embedding)
        return embedded if gate is None else torch.where(gate.view(*tokens.shape, 1), self._mask_row, embedded)

    def _attend(
        self,
        index: int,
        hidden: Tensor,
        parts: Tensor | None,
        rows: PassRows,
        cache: SlotCache,
        updates: LayerUpdates,
    ) -> tuple[Tensor, Tensor]:
        """Return hidden [R, C] + parts [P, R, C], and in parts what a layer's attention adds to it."""
        layer, few = self._layers[index], self.kernels
        many = self._products(hidden)
        hidden, normed = few.normalize(hidden, parts, layer.input_norm, self.epsilon)
        heads = many.multiply(normed, layer.query_key_value, updates.query_key_value)
        keys, values = cache.keys[index], cache.values[index]
        query = few.rotate_and_store(heads, layer.query_key_value_bias, self._angles, rows, keys, values)
        attended = few.attend_slots(query, keys, values, rows)  # [B, T, H, E]
        return hidden, many.multiply(attended.reshape(len(hidden), -1), layer.output, updates.output)

    def _transform(
        self, index: int, hidden: Tensor, parts: Tensor | None, updates: LayerUpdates
    ) -> tuple[Tensor, Tensor]:
        """Return hidden [R, C] + parts [P, R, C], and in parts what a layer's MLP adds to it."""
        layer, many = self._layers[index], self._products(hidden)
        hidden, normed = self.kernels.normalize(hidden, parts, layer.middle_norm, self.epsilon)
        self.model.layer_calls += 1
        inner = many.multiply_gated(normed, layer.gate_up, updates.gate_up)
        return hidden, many.multiply(inner, layer.down, updates.down)

    def _products(self, hidden: Tensor) -> Operations | ModuleType:
        return self.kernels if len(hidden) <= self.max_few_rows else operations


def is_fused_by_itself(model: BlockDiffusionLM) -> bool:
    """Whether an engine that was not told runs the fused pass: where kernels make it faster."""
    is_faster = model.device.type == "cuda" and has_kernels_for(head_size(model))
    if is_faster and not can_fuse(model):
        print("the fused pass does not know all layers of this model: its own layers run, which are slower")
    return is_faster and can_fuse(model)


def can_fuse(model: BlockDiffusionLM) -> bool:
    """Whether all matrices of the model are plain, or plain with a gated adapter's updates."""
    backbone = model.qwen.model
    parts = [layer.get_submodule(name) for layer in backbone.layers for name in _MATRICES]
    embedding = backbone.embed_tokens
    embedding = embedding.base_layer if type(embedding) is MaskRowEmbedding else embedding
    return type(embedding) is nn.Embedding and all(type(_base(part)) is nn.Linear for part in parts)


def _base(linear: nn.Module) -> nn.Module:
    """Return the linear layer that a gated update is added to, or the layer itself where there is none."""
    return linear.base if type(linear) is GatedLinear else linear


_MATRICES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def takes_triton(device: torch.device) -> bool:
    """Return whether passes there are made of Triton's kernels: on GPUs from Ampere on; it has no matrix products for
    older ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def default_kernels(device: torch.device) -> Operations | ModuleType:
    """Return Triton's kernels for a GPU that takes them, plain torch for anything else.

    The tiles measured on Hopper need more shared memory than other GPUs have.
    """
    if not takes_triton(device):
        return operations
    from fastdllm.decoding.kernels import Kernels  # Triton comes with torch for GPUs alone

    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return Kernels(None if is_hopper else {}, overlap=is_hopper)


def _fuse(layer: nn.Module) -> FusedLayer:
    query, key, value, output, gate, up, down = (_base(layer.get_submodule(name)) for name in _MATRICES)
    return FusedLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        query_key_value=_merge([query.weight, key.weight, value.weight]),
        query_key_value_bias=_merge([query.bias, key.bias, value.bias]),
        output=output.weight.detach(),
        middle_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_merge([gate.weight, up.weight]),
        down=down.weight.detach(),
    )


def _merge(parameters: list[nn.Parameter]) -> Tensor:
    """Return the parameters in one tensor, one after the other; they become views of it, or are so already."""
    first, num_rows = parameters[0].detach(), [len(parameter) for parameter in parameters]
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters[:-1]]
    is_one_storage = len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
    if is_one_storage and ends == [parameter.data_ptr() for parameter in parameters[1:]]:
        return first.as_strided((sum(num_rows), *first.shape[1:]), first.stride())
    merged = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, merged.split(num_rows), strict=True):
        parameter.data = view
    return merged


class FusedPasses(PlainForward):
    """A forward pass for the engine: FusedForward over its cache, and proposals without logits."""

    def __init__(self, model: BlockDiffusionLM, cache: SlotCache):
        super().__init__(model, cache)
        self.fused = FusedForward(model)

    def __call__(
        self, tokens: Tensor, rows: PassRows, reuse: LayerStore | None = None, *, is_clean: bool = False
    ) -> Tensor:
        return self.fused(tokens, rows, self.cache, reuse, is_clean=is_clean)

    def part(
        self, layers: range, tokens: Tensor, hidden: Tensor | None, rows: PassRows, reuse: LayerStore | None
    ) -> Tensor:
        return self.fused(tokens, rows, self.cache, reuse, layers=layers, before=hidden)

    def propose(self, hidden: Tensor, needs=frozenset(), temperature=0.0, top_p=1.0, uniform=None):
        if temperature > 0:  # drawing needs all logits
            return super().propose(hidden, needs, temperature, top_p, uniform)
        best, *numbers = (x.view(hidden.shape[:-1]) for x in self.fused.statistics(hidden.flatten(0, 1)))
        best_logit, log_sum_exp, second_logit, entropy = numbers
        confidence = (best_logit - log_sum_exp).exp()
        margin = confidence - (second_logit - log_sum_exp).exp() if "margin" in needs else None
        return Proposals(best, confidence, margin, entropy), best
