"""The forward pass that the passes of decoding ask for: which rows, which cache, and what they propose."""

from torch import Tensor

from fastdllm.decoding.cache import SlotCache
from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.policies import Proposals, make_proposals
from fastdllm.decoding.reuse import LayerStore
from fastdllm.model import BlockDiffusionLM


class PlainForward:
    """The layers as they are, with a dense mask: the truth that faster forward passes are tested against."""

    def __init__(self, model: BlockDiffusionLM, cache: SlotCache):
        self.model, self.cache = model, cache
        self.num_visible = cache.capacity  # places that any row can see; less is quicker

    def __call__(
        self, tokens: Tensor, rows: PassRows, reuse: LayerStore | None = None, *, is_clean: bool = False
    ) -> Tensor:
        """Return the hidden states [B, T, C] of `tokens` [B, T] int64, which stand at `rows`.

        `is_clean` says that no row that anyone reads holds the mask token; where that saves nothing it is not read.
        """
        return self.model.hidden_states(tokens, rows.positions, self._prepare(rows), self.cache, reuse)

    def part(
        self, layers: range, tokens: Tensor, hidden: Tensor | None, rows: PassRows, reuse: LayerStore | None
    ) -> Tensor:
        """Return what `layers` make of `hidden` [B, T, C], of the embedded `tokens` if it is None; final norm included.

        The norm follows the last layer alone. Two parts are a whole pass, if all else is the same in both.
        """
        attention_mask = self._prepare(rows)
        embedded, rotary = self.model.embed(tokens, rows.positions)
        hidden = embedded if hidden is None else hidden
        hidden = self.model.run_layers(layers, hidden, rotary, attention_mask, self.cache, reuse)
        return self.model.norm(hidden) if layers.stop == self.model.num_layers else hidden

    def propose(
        self,
        hidden: Tensor,
        needs: frozenset[str] = frozenset(),
        temperature: float = 0.0,
        top_p: float = 1.0,
        uniform: Tensor | None = None,
    ) -> tuple[Proposals, Tensor]:
        """Return what `hidden` [B, S, C] proposes, as make_proposals does, and the most likely tokens, [B, S]."""
        logits = self.model.logits(hidden)
        proposals = make_proposals(logits, needs, temperature, top_p, uniform)
        return proposals, proposals.token if temperature == 0 else logits.argmax(-1)

    def _prepare(self, rows: PassRows) -> Tensor:
        """Tell the cache what the next pass writes and sees; return the attention mask [B, 1, T, S]."""
        self.cache.select(rows.slots, rows.places, self.num_visible, rows.has_own)
        seen = self.cache.visible(self.num_visible, rows.has_own)
        return rows.sees(seen)[:, None]
