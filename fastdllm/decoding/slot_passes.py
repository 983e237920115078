"""What the passes of decoding have in common: which rows they run, what those propose, and how it is written back."""

import torch
from torch import Tensor

from fastdllm.decoding.cache import SlotCache
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.policies import DEFAULT_POLICY, POLICIES, Proposals
from fastdllm.decoding.reuse import LayerStore, ReuseConfig
from fastdllm.decoding.state import SlotNumbers, SlotState, uniform_draws
from fastdllm.decoding.tables import by_name
from fastdllm.model import BlockDiffusionLM


class SlotPasses:
    """Owns how a pass reads and writes the state of slots; what a pass does is a subclass's."""

    def __init__(
        self,
        model: BlockDiffusionLM,
        state: SlotState,
        cache: SlotCache,
        forward: PlainForward,
        *,
        is_diffusion: bool,
        decode: DecodeConfig,
        reuse: ReuseConfig,
    ):
        self.model, self.state, self.cache, self.forward = model, state, cache, forward
        self.is_diffusion, self.decode, self.reuse = is_diffusion, decode, reuse
        self.policy = POLICIES[decode.policy if is_diffusion else DEFAULT_POLICY]  # token by token it decides nothing
        # constants, each made on the device once
        self._ranges: dict[int, Tensor] = {}
        self._numbers: dict[int, Tensor] = {}
        self._amounts: dict[tuple, Tensor] = {}

    def _rows(self, slots: Tensor, places: Tensor, is_kept: Tensor, limits: Tensor) -> PassRows:
        """Return the rows at `places` [B, T]; keys and values of those that are not kept go nowhere."""
        return PassRows(places, torch.where(is_kept, places, self._number(self.cache.dump)), slots, limits)

    def _run(self, rows: PassRows, reuse: LayerStore | None = None, guess: Tensor | None = None) -> Tensor:
        return self.forward(self._tokens(rows, guess), rows, reuse)

    def _run_clean(self, rows: PassRows) -> Tensor:
        """As `_run`, for rows without mask tokens."""
        return self.forward(self._tokens(rows), rows, is_clean=True)

    def _tokens(self, rows: PassRows, guess: Tensor | None = None) -> Tensor:
        """Return the tokens of the rows, [B, T]; at the place behind the first block `guess` [B], if there is one."""
        known = self.state.tokens
        if guess is None:
            return known[rows.slots[:, None], rows.positions]
        tokens = known[rows.slots[:, None], rows.positions.clamp(max=known.shape[1] - 1)]
        tokens[:, self.model.block_size] = guess
        return tokens

    def _clean_limits(self, places: Tensor) -> Tensor:
        if not self.is_diffusion or self.model.context_attention == "causal":
            return places + 1
        return (places // self.model.block_size + 1) * self.model.block_size

    def _propose(self, at: SlotNumbers, hidden: Tensor) -> tuple[Proposals, Tensor]:
        """Return the proposals from `hidden` [B, S, C], and the most likely token of the first row, [B]."""
        decode = self.decode
        uniform = self._uniform(at, hidden.shape[1])
        proposals, best = self.forward.propose(hidden, self.policy.needs, decode.temperature, decode.top_p, uniform)
        return proposals, best[:, 0]

    def _uniform(self, at: SlotNumbers, count: int) -> Tensor | None:
        """Return the numbers to draw proposals with, [B, count] float32; None without temperature."""
        return None if self.decode.temperature == 0 else uniform_draws(at.seed, at.draws, count)

    def _best(self, hidden: Tensor) -> Tensor:
        """Return the most likely token after each of `hidden` [B, C], [B]."""
        return self.forward.propose(hidden[:, None])[1][:, 0]

    def _block_places(self, at: SlotNumbers) -> Tensor:
        """Return the places of each slot's current block, [B, D]; in AR mode that of the newest token, [B, 1]."""
        if self.is_diffusion:
            return at.start[:, None] + self._range(self.model.block_size)
        return at.start[:, None]

    def _inside(self, at: SlotNumbers) -> Tensor:
        """Return the places of each slot's sub-block in its block, [B, S]."""
        return at.offset[:, None] + self._range(self.decode.sub_block_size)

    def _known(self, slots: Tensor, places: Tensor) -> Tensor:
        """Return the tokens at the places [B, T] of each slot."""
        return self.state.tokens[slots[:, None], places]

    def _put(self, slots: Tensor, at: SlotNumbers, places: Tensor, block: Tensor, is_served: Tensor) -> None:
        """Write back what a pass has changed in the slots that it served: tokens at `places`, and the numbers."""
        target = self._target(slots, is_served)
        self.state.tokens[target[:, None], places] = block
        self.state.put(target, at)

    def _target(self, slots: Tensor, is_served: Tensor) -> Tensor:
        return torch.where(is_served, slots, self._number(self.state.dump))

    def _count(self, at: SlotNumbers, **amounts: int) -> SlotNumbers:
        """Return the numbers as they were taken, with the amounts added."""
        key = tuple(amounts.items())
        if key not in self._amounts:
            self._amounts[key] = by_name(amounts).to(self.model.device)
        return SlotNumbers(at.taken + self._amounts[key])

    def _number(self, value: int) -> Tensor:
        """Return the value as a tensor that is made once."""
        if value not in self._numbers:
            self._numbers[value] = torch.tensor(int(value), device=self.model.device)
        return self._numbers[value]

    def _range(self, count: int) -> Tensor:
        if count not in self._ranges:
            self._ranges[count] = torch.arange(count, device=self.model.device)
        return self._ranges[count]
