"""Verifying passes: drafts are checked by the model's own token-by-token mode, and the next ones made on the way.

One pass holds, for each slot, the newest token, the drafts behind it as clean rows, and groups of mask tokens: each
stands where the next drafts would, if so many of these were accepted. A draft is accepted if the clean row before it
chooses it and all drafts before it are accepted; the pass gives one more token behind them. So every token is one that
token-by-token decoding would choose, whatever is drafted. `reference.decode_verified` is the same without caches.

At a temperature, the token of a place is drawn with a number that is a function of (seed, place) alone. A draft is
certain (all its probability q is on one token); rejection sampling (accept with min(1, p / q), else draw from what p
has beyond q) then comes to this: draw from p and see whether the draft came. So answers do not depend on drafts either,
and no distribution has to be kept for them; what that costs is drafts accepted where both are unsure.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdllm.decoding.drafts import DraftPlan
from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.state import Phase, SlotNumbers, uniform_draws
from fastdllm.decoding.steps import Steps, take_rows
from fastdllm.masks import GROUP_SEES_BOTH_WAYS

ONE_HEAD_ROWS = 128  # up to here the head on a GPU, where reading it takes the time, is asked once and for all rows


class DraftTables(NamedTuple):
    """What a plan alone decides; K drafts, G groups."""

    groups: Tensor
    """[G]: accepted lengths."""
    places: Tensor
    """[G * K]: where drafting rows keep keys and values; nobody else's, and not kept for the next pass."""
    own_firsts: Tensor
    """[1 + K + G * K]: the first of the places that a row sees in its group; 0 for clean rows."""
    own_ends: Tensor
    """[1 + K + G * K]: the place behind the last of them; 0 for clean rows."""


class VerifySteps(Steps):
    """Steps whose token-by-token phase is a verifying pass."""

    def __init__(self, *arguments, max_drafts: int, **options):
        super().__init__(*arguments, **options)
        # drafts stand apart from the tokens, which hold nothing but what is verified
        self.drafts = torch.zeros(self.state.num_slots + 1, max_drafts, dtype=torch.int64, device=self.model.device)
        self._tables: dict[DraftPlan, DraftTables] = {}
        self.one_head_rows = ONE_HEAD_ROWS if self.model.device.type == "cuda" else 0

    @property
    def first_phase(self) -> Phase:
        return Phase.VERIFY

    def drafted(self) -> Tensor:
        """Return the drafts that the next pass verifies, [num_slots, K] int64, and -1 behind them."""
        at = self.state.take(self._range(self.state.dump))
        inside, num_drafts = self._range(self.drafts.shape[1]), at.num_drafts.minimum(at.limit - at.final)
        return torch.where(inside < num_drafts[:, None], self.drafts[: self.state.dump], self._number(-1))

    def verify(self, slots: Tensor, plan: DraftPlan) -> None:
        """Verify each slot's drafts, write what is accepted and one token more, and make the next drafts."""
        at, size = self.state.take(slots), plan.length + 1
        is_served = at.phase == Phase.VERIFY
        # a draft in the last place, or behind it, would save nothing
        num_drafts = at.num_drafts.clamp(max=plan.length).minimum(at.limit - 2 - at.start).clamp(min=0)
        drafts, tables = self.drafts[slots][:, : plan.length], self._plan_tables(plan)
        lengths = tables.groups.minimum(num_drafts[:, None])  # [B, G]
        masked = self._number(self.model.mask_token_id).expand(len(slots), plan.num_drafting)
        tokens = torch.cat([self._known(slots, at.start[:, None]), drafts, masked], dim=1)
        rows = self._draft_rows(slots, at, is_served, num_drafts, lengths, tables)
        hidden = self.forward(tokens, rows, is_clean=not plan.num_drafting)
        best_of = self._best_of(hidden)
        chosen = self._choose(at, hidden, size, best_of)
        is_right = (chosen[:, :-1] == drafts) & (self._range(plan.length) < num_drafts[:, None])
        accepted = self._num_accepted(at, is_right, num_drafts)
        num_layers = self.model.num_layers
        at = self._count(at, denoise_passes=1, layers_run=num_layers, rows_run=num_layers * plan.num_rows)
        at.computed_tokens = at.computed_tokens + accepted + 1
        at.accepted_drafts = at.accepted_drafts + accepted
        at.checked_drafts = at.checked_drafts + accepted + (accepted < num_drafts)
        at.num_drafts = self._draft(slots, is_served, best_of, accepted, lengths, plan)
        places = at.start[:, None] + 1 + self._range(size)
        is_new = self._range(size) <= accepted[:, None]
        block = torch.where(is_new, chosen, self._number(self.model.mask_token_id))
        self._finish(at, places, block, at.start + accepted + 2, self._number(Phase.VERIFY))
        at.start = at.final - 1
        self._put(slots, at, places, block, is_served)

    def _plan_tables(self, plan: DraftPlan) -> DraftTables:
        if plan not in self._tables:
            K, drafting = plan.length, torch.arange(plan.num_drafting)
            scratch = self.cache.capacity
            firsts = scratch + drafting // max(K, 1) * K
            ends = firsts + K if GROUP_SEES_BOTH_WAYS else scratch + drafting + 1
            clean = torch.zeros(1 + K, dtype=torch.int64)
            groups = torch.tensor(plan.groups, dtype=torch.int64)
            tables = groups, scratch + drafting, torch.cat([clean, firsts]), torch.cat([clean, ends])
            self._tables[plan] = DraftTables(*(tensor.to(self.model.device) for tensor in tables))
        return self._tables[plan]

    def _draft_rows(
        self,
        slots: Tensor,
        at: SlotNumbers,
        is_served: Tensor,
        num_drafts: Tensor,
        lengths: Tensor,
        tables: DraftTables,
    ) -> PassRows:
        """Return the rows of a verifying pass, [B, 1 + K + G * K]: clean ones, then group by group."""
        num_rows, num_drafting = len(tables.own_firsts), len(tables.places)
        inside, K = self._range(num_rows - num_drafting), num_rows - num_drafting - 1
        clean = at.start[:, None] + inside
        is_kept = is_served[:, None] & (inside <= num_drafts[:, None])
        clean_places = torch.where(is_kept, clean, self._number(self.cache.dump))
        behind = (at.start[:, None] + lengths + 1)[..., None].expand(-1, -1, K)  # [B, G, K]: the first place behind
        drafting = (behind + self._range(K)).flatten(1)
        positions = torch.cat([clean, drafting], dim=1)
        return PassRows(
            positions=positions,
            places=torch.cat([clean_places, tables.places.expand(len(slots), -1)], dim=1),
            slots=slots,
            limits=torch.cat([clean + 1, behind.flatten(1)], dim=1).clamp(max=self.cache.capacity),
            own_firsts=tables.own_firsts.expand_as(positions),
            own_ends=tables.own_ends.expand_as(positions),
        )

    def _best_of(self, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what gives the most likely tokens [B, n] of rows [B, n] of hidden [B, T, C].

        Where rows are few, the head is read once for all of them; else for each of the two questions of a pass anew.
        """
        if self.decode.temperature > 0 or hidden.shape[0] * hidden.shape[1] > self.one_head_rows:
            return lambda rows: self.forward.propose(take_rows(hidden, rows))[1]
        best = self.forward.propose(hidden)[1]
        return lambda rows: best.gather(1, rows)

    def _choose(self, at: SlotNumbers, hidden: Tensor, count: int, best_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what is chosen behind each of the first `count` rows, clean ones, [B, count]; by mode ar's draws."""
        decode, B = self.decode, len(hidden)
        if decode.temperature == 0:
            return best_of(self._range(count).expand(B, -1))
        number = (at.start + 1 - at.prompt_length)[:, None] + self._range(count)
        uniform = uniform_draws(at.seed.repeat_interleave(count), number.flatten(), 1).view(B, count)
        drawn = self.forward.propose(hidden[:, :count], frozenset(), decode.temperature, decode.top_p, uniform)
        return drawn[0].token

    def _num_accepted(self, at: SlotNumbers, is_right: Tensor, num_drafts: Tensor) -> Tensor:
        """Return the drafts before the first wrong one, [B]; is_right: [B, K] bool. Benchmarks replay a trace here."""
        return is_right.long().cumprod(1).sum(1)

    def _draft(
        self,
        slots: Tensor,
        is_served: Tensor,
        best_of: Callable[[Tensor], Tensor],
        accepted: Tensor,
        lengths: Tensor,
        plan: DraftPlan,
    ) -> Tensor:
        """Keep the drafts of the group for the longest length up to the accepted one; return how many reach on, [B]."""
        if not plan.length:
            return torch.zeros_like(accepted)
        group = (lengths <= accepted[:, None]).sum(1, keepdim=True) - 1  # [B, 1]
        is_behind = accepted - lengths.gather(1, group)[:, 0]
        row = (self._range(plan.length) + is_behind[:, None]).clamp(max=plan.length - 1)
        drafts = best_of(1 + plan.length + group * plan.length + row)
        target = self._target(slots, is_served)
        self.drafts[target[:, None], self._range(plan.length)] = drafts
        return plan.length - is_behind
