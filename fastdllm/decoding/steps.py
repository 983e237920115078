"""The passes of decoding: functions of slot numbers that read and change device state and ask the host nothing.

A pass takes any slots. It acts on those whose phase it serves and leaves the others as they were, so the host may be
behind the device, and numbers may be filled up with the spare slot. What it works out for the others goes nowhere.

Beside the layers these are many tiny kernels, of which each costs as much as a large one to start. So whatever depends
on a phase or on a place in the block alone is looked up in a table that is made once. Source: method.md 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.policies import Proposals
from fastdllm.decoding.reuse import GatedStore, make_store, needed_rows
from fastdllm.decoding.slot_passes import SlotPasses
from fastdllm.decoding.state import Phase, SlotNumbers
from fastdllm.decoding.tables import DENOISED, FUSED, block_changes, block_roles, next_steps


class Steps(SlotPasses):
    """Owns how each pass changes the state; the engine owns which passes are run when."""

    def __init__(self, *parts, stop_ids: Iterable[int], **settings):
        """Take what SlotPasses takes, and the tokens that end an answer."""
        super().__init__(*parts, **settings)
        model, state, reuse = self.model, self.state, self.reuse
        self._make_tables(stop_ids)
        self.store = make_store(model, reuse, state.num_slots, self.decode.sub_block_size)
        self.is_output = reuse.reuse_k > 1 and reuse.reuse_mode == "output"
        if self.is_output:  # what the last full pass gave for each row of the block
            shape = (state.num_slots, model.block_size, model.qwen.config.hidden_size)
            self.kept = torch.zeros(shape, dtype=model.dtype, device=model.device)

    @property
    def first_phase(self) -> Phase:
        """The pass that comes after prefill; token by token, and if drafts are verified, every later one too."""
        return Phase.FULL if self.is_diffusion else Phase.TOKEN

    def _make_tables(self, stop_ids: Iterable[int]) -> None:
        model, decode, size = self.model, self.decode, self.model.block_size
        device, self.width = model.device, size * (2 if decode.fuse_append else 1)  # rows of a pass over whole blocks
        inside = torch.arange(self.width, device=device)
        self.sub_block_of = inside // decode.sub_block_size * decode.sub_block_size
        self.block_end = (inside // size + 1) * size
        self.is_next = inside >= size  # rows of the next block, behind one that is appended
        before = torch.arange(size + 1, device=device)[:, None] + torch.arange(decode.sub_block_size, device=device) - 1
        self.before = before.clamp(0, self.width - 1)  # [D + 1, S]: by the token shift, rows that propose from offset o
        self.roles = {way: block_roles(way).to(device) for way in (False, True)}
        self.changes = block_changes(model.num_layers, size, self.width).to(device)
        self.next_steps = next_steps(size, decode, self.reuse).to(device)
        tokens = torch.arange(model.qwen.config.vocab_size, device=device)
        self.is_stop = torch.isin(tokens, torch.tensor(sorted(stop_ids), device=device))

    def prefill(self, slots: Tensor, width: int) -> None:
        """Read the next `width` places of the prompts into the block cache; at their ends, find what comes next."""
        at = self.state.take(slots)
        is_served = at.phase == Phase.PREFILL
        places = at.prefilled[:, None] + self._range(width)
        target = at.start
        is_kept = is_served[:, None] & (places < target[:, None])
        places = torch.where(is_kept, places, 0)
        hidden = self._run_clean(self._rows(slots, places, is_kept, self._clean_limits(places)))
        last = (target - 1 - at.prefilled).clamp(0, width - 1)
        ends = at.prefilled + width >= target
        at = self._count(at, prefill_passes=1, layers_run=self.model.num_layers)
        at.rows_run = at.rows_run + self.model.num_layers * is_kept.sum(1)
        at.prefilled = (at.prefilled + width).minimum(target)
        places = self._block_places(at)
        block = self._known(slots, places)
        if self.is_diffusion:  # a prompt of whole blocks: the next block's first token comes from the last row
            rows = hidden[torch.arange(len(slots), device=slots.device), last]
            block = self._begin_block(at, block, is_served & ends & (at.prompt_length == target), self._best(rows))
        self._plan(slots, at, places, block)
        at.phase = torch.where(ends, at.phase, self._number(Phase.PREFILL))
        self._put(slots, at, places, block, is_served)

    def begin(self, slots: Tensor) -> None:
        """Find the first pass of slots whose prompt needs no prefill."""
        at = self.state.take(slots)
        places = self._block_places(at)
        block = self._known(slots, places)
        self._plan(slots, at, places, block)
        self._put(slots, at, places, block, at.start <= at.prefilled)

    def block(self, slots: Tensor, *, is_universal: bool = False) -> None:
        """Run all rows of each slot's block: appends, full denoising steps, and if `is_universal` sub-block ones too.

        In the last, the rows outside the sub-block are computed and left unused: their keys and values stay stale. With
        `fuse_append` the next block's rows come with an append; if the guess of its first token was right, what they
        give is the next block's first denoising step, and else it is forgotten.
        """
        at, size = self.state.take(slots), self.model.block_size
        is_append, is_full, is_denoised, is_served = self.roles[is_universal][at.phase].unbind(1)
        if self.store is not None:
            kept_for = torch.where(is_full, slots, self.state.spare)
            self.store.select(kept_for, self._range(size).expand(len(slots), -1), is_reused=False, is_full=True)
        guess = at.guess if self.decode.fuse_append else None
        hidden = self._run(self._block_rows(slots, at, is_append, is_full, is_universal), self.store, guess)
        if self.is_output:
            self.kept[torch.where(is_full, slots, self.state.spare)] = hidden
        # of an appended block, the last row and those of the next block
        rows = self.before[torch.where(is_append, self._number(size), at.offset)]
        proposals, greedy = self._propose(at, take_rows(hidden, rows))
        change = at.phase
        if guess is not None:
            last = self._best(hidden[:, size - 1])
            is_fused = is_append & (greedy == guess)
            change = torch.where(is_fused, self._number(FUSED), change)
        kept, added = self.changes[change].unbind(1)
        at = SlotNumbers(torch.addcmul(added, at.taken, kept))
        if guess is not None:
            at.guess = torch.where(is_denoised, last, guess)
            is_denoised = is_denoised | is_fused
        if self.reuse.is_trimmed:
            self.state.is_dirty[slots] &= ~is_served[:, None]
        places = self._block_places(at)
        block = self._begin_block(at, self._known(slots, places), is_append, greedy)
        block = self._unmask(slots, at, block, is_denoised, proposals)
        self._plan(slots, at, places, block)
        self._put(slots, at, places, block, is_served)

    def _block_rows(
        self, slots: Tensor, at: SlotNumbers, is_append: Tensor, is_full: Tensor, is_universal: bool
    ) -> PassRows:
        """Return the rows of each slot's block, and with `fuse_append` of the next one, [B, D] or [B, 2D]."""
        places, limits = at.start[:, None] + self._range(self.width), at.start[:, None] + self.block_end
        is_kept = (is_append | is_full)[:, None]
        if is_universal:
            is_inside = self.sub_block_of == at.offset[:, None]
            is_kept = is_kept | (is_inside & (at.phase == Phase.SUB_BLOCK)[:, None])
        if self.decode.fuse_append:
            is_kept = torch.where(self.is_next, is_append[:, None] & (places < self.cache.capacity), is_kept)
        if self.model.context_attention == "causal":
            limits = torch.where(is_append[:, None] & ~self.is_next, places + 1, limits)
        return self._rows(slots, places, is_kept, limits)

    def sub_block(self, slots: Tensor, *, is_reused: bool = False) -> None:
        """Run a denoising step over the rows of each slot's sub-block."""
        at = self.state.take(slots)
        is_served = at.phase == (Phase.REUSE if is_reused else Phase.SUB_BLOCK)
        if is_reused and self.is_output:
            hidden = self.kept[slots[:, None], (self._inside(at) - 1).clamp(min=0)]
            proposals = self._propose(at, hidden)[0]
            self._denoise(slots, self._count(at, **DENOISED), is_served, proposals)
            return
        self._select(slots, at, is_served, is_reused)
        hidden = self._run(self._sub_block_rows(slots, at, is_served), self.store)
        self._finish_step(slots, at, is_served, hidden, self.model.num_layers - self._num_left_out(is_reused))

    def active_rows(self, slots: Tensor, num_rows: int) -> None:
        """Run a denoising step over the active rows of each slot's sub-block alone, `num_rows` in all, filler included.

        Rows of all slots stand one below the other, each its own row of the pass. The keys and values of the others
        stay as they are in the block's own cache. A slot whose rows do not all fit is left as it was.
        """
        state, size = self.state, self.decode.sub_block_size
        at = state.take(slots)
        block = self._known(slots, self._block_places(at))
        is_active = self._active_rows(slots, at, block) & (at.phase == Phase.SUB_BLOCK)[:, None]
        is_served = is_active.any(1) & (is_active.sum(1).cumsum(0) <= num_rows)
        is_active &= is_served[:, None]
        chosen = (~is_active).flatten().argsort(stable=True)[:num_rows]  # [R], the active ones first
        # one slot's rows are one row of the pass: its keys and values need not be laid out for each of them
        shape = (1, -1) if len(slots) == 1 else (-1, 1)
        places, _, _, limits, *_ = self._sub_block_rows(slots, at, is_served)
        places, limits, is_kept = (x.flatten()[chosen].view(shape) for x in (places, limits, is_active))
        owners = slots if len(slots) == 1 else slots[chosen // size]
        hidden = self._run(self._rows(owners, places, is_kept, limits)).flatten(0, 1)  # [R, C]
        proposals = self._propose_for_next(at, hidden, chosen)
        state.is_dirty[slots[:, None], self._inside(at)] &= ~is_active
        at = self._count(at, **DENOISED, layers_run=self.model.num_layers)
        at.rows_run = at.rows_run + self.model.num_layers * is_active.sum(1)
        self._denoise(slots, at, is_served, proposals)

    def _propose_for_next(self, at: SlotNumbers, hidden: Tensor, chosen: Tensor) -> Proposals:
        """Return the proposals [B, S] of `hidden` [R, C], rows `chosen` [R] of all B * S, each for the place behind it.

        No sub-block's first place is masked, so nothing is asked of the last row of the slot before.
        """
        decode, num_slots = self.decode, len(at.phase)
        count = num_slots * decode.sub_block_size
        following = (chosen + 1) % count
        uniform = self._uniform(at, decode.sub_block_size)
        uniform = None if uniform is None else uniform.flatten()[following][None]
        options = (self.policy.needs, decode.temperature, decode.top_p, uniform)
        proposals, _ = self.forward.propose(hidden[None], *options)

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(count).scatter(0, following, values[0]).view(num_slots, -1)

        return Proposals(*map(spread, proposals))

    def _active_rows(self, slots: Tensor, at: SlotNumbers, block: Tensor) -> Tensor:
        """Return the rows of each slot's sub-block that its next denoising step needs, [B, S] bool."""
        inside = self._inside(at)
        is_masked = block.gather(1, inside) == self.model.mask_token_id
        return needed_rows(is_masked, self.state.is_dirty[slots[:, None], inside])

    def probe(self, slots: Tensor) -> None:
        """Run the layers before the subset over each slot's sub-block; they decide what the other layers do."""
        state, store = self.state, self._gate
        at = state.take(slots)
        is_served = at.phase == Phase.PROBE
        hidden = self._run_part(slots, at, is_served, range(store.first), None)
        is_reused = store.decide(torch.where(is_served, slots, state.spare), self._inside(at), hidden)
        rows_run = store.first * self.decode.sub_block_size
        at = self._count(at, layers_run=store.first, rows_run=rows_run)
        at.phase = torch.where(is_reused, self._number(Phase.REUSE_REST), self._number(Phase.REFRESH))
        state.put(self._target(slots, is_served), at)

    def rest(self, slots: Tensor, *, is_reused: bool) -> None:
        """Go on from `probe`: run the other layers, the subset with them or without, and unmask."""
        store, num_layers, at = self._gate, self.model.num_layers, self.state.take(slots)
        is_served = at.phase == (Phase.REUSE_REST if is_reused else Phase.REFRESH)
        self._select(slots, at, is_served, is_reused)
        hidden = self._run_part(slots, at, is_served, range(store.first, num_layers), store.waiting[slots])
        num_run = num_layers - store.first - self._num_left_out(is_reused)
        self._finish_step(slots, at, is_served, hidden, num_run)

    def _run_part(
        self, slots: Tensor, at: SlotNumbers, is_served: Tensor, layers: range, hidden: Tensor | None
    ) -> Tensor:
        rows = self._sub_block_rows(slots, at, is_served)
        reuse = None if hidden is None else self.store
        return self.forward.part(layers, self._tokens(rows), hidden, rows, reuse)

    @property
    def _gate(self) -> GatedStore:
        assert isinstance(self.store, GatedStore), "only schedule adaptive plans these passes"
        return self.store

    def _sub_block_rows(self, slots: Tensor, at: SlotNumbers, is_served: Tensor) -> PassRows:
        """Return the rows of each slot's sub-block, [B, S]."""
        start = at.start[:, None]
        places = start + self._inside(at)
        return self._rows(slots, places, is_served[:, None], (start + self.model.block_size).expand_as(places))

    def _select(self, slots: Tensor, at: SlotNumbers, is_served: Tensor, is_reused: bool) -> None:
        if self.store is not None:
            kept_for = torch.where(is_served, slots, self.state.spare)
            self.store.select(kept_for, self._inside(at), is_reused=is_reused, is_full=False)

    def _num_left_out(self, is_reused: bool) -> int:
        """Return the layers that a step leaves out; in mode attn the MLPs of all layers run."""
        return len(self.store.layers) if is_reused and self.reuse.reuse_mode != "attn" else 0

    def _finish_step(self, slots: Tensor, at: SlotNumbers, is_served: Tensor, hidden: Tensor, num_layers: int) -> None:
        """Unmask by the hidden states [B, S, C] of the sub-block's rows, after the final norm."""
        proposals, _ = self._propose(at, hidden[:, self.before[0]])
        rows_run = num_layers * self.decode.sub_block_size
        at = self._count(at, **DENOISED, layers_run=num_layers, rows_run=rows_run)
        self._denoise(slots, at, is_served, proposals)

    def _denoise(self, slots: Tensor, at: SlotNumbers, is_served: Tensor, proposals: Proposals) -> None:
        """Unmask, plan, and write everything back."""
        places = self._block_places(at)
        block = self._unmask(slots, at, self._known(slots, places), is_served, proposals)
        self._plan(slots, at, places, block)
        self._put(slots, at, places, block, is_served)

    def token(self, slots: Tensor) -> None:
        """Read the newest token of each slot and write the next one (AR mode)."""
        at = self.state.take(slots)
        is_served = at.phase == Phase.TOKEN
        places = at.start[:, None]
        hidden = self._run_clean(self._rows(slots, places, is_served[:, None], places + 1))
        token = self._propose(at, hidden)[0].token
        num_layers = self.model.num_layers
        run = dict(denoise_passes=1, layers_run=num_layers, rows_run=num_layers)
        at = self._count(at, start=1, draws=1, computed_tokens=1, **run)
        places = self._block_places(at).clamp(max=self.cache.capacity - 1)  # a slot that is done may be at its end
        self._plan(slots, at, places, token)
        self._put(slots, at, places, token, is_served)

    def drafted(self) -> Tensor:
        """Return what stands behind the final tokens of each slot's block, [num_slots, D] int64.

        Mask tokens where nothing is decided, and -1 behind the block and the answer; in AR mode there is no more.
        """
        at, size, tokens = self.state.take(self._range(self.state.dump)), self.model.block_size, self.state.tokens
        num_left = (-at.final % size).minimum(at.limit - at.final) if self.is_diffusion else at.final * 0
        places = at.final[:, None] + self._range(size)
        seen = tokens[: self.state.dump].gather(1, places.clamp(max=tokens.shape[1] - 1))
        return torch.where(self._range(size) < num_left[:, None], seen, self._number(-1))

    def _unmask(
        self, slots: Tensor, at: SlotNumbers, block: Tensor, is_denoised: Tensor, proposals: Proposals
    ) -> Tensor:
        """Return the block with the accepted proposals for its sub-block; place 0 of a block is never masked."""
        inside = self._inside(at)
        present = block.gather(1, inside)
        is_candidate = (present == self.model.mask_token_id) & is_denoised[:, None]
        is_accepted = self.policy.accept(proposals, is_candidate, self._parameter(slots, at))
        if self.reuse.is_trimmed:
            self.state.is_dirty[slots[:, None], inside] |= is_accepted
        at.computed_tokens = at.computed_tokens + is_accepted.sum(1)
        return block.scatter_(1, inside, torch.where(is_accepted, proposals.token, present))

    def _parameter(self, slots: Tensor, at: SlotNumbers) -> Tensor:
        """Return the policy's number for each slot, [B] float32; benchmarks replay a trace here."""
        return self.state.parameter[slots]

    def _begin_block(self, at: SlotNumbers, block: Tensor, is_begun: Tensor, token: Tensor) -> Tensor:
        """Return the block with its first token [B] where it is begun."""
        block[:, 0] = torch.where(is_begun, token, block[:, 0])
        at.computed_tokens = at.computed_tokens + is_begun
        return block

    def _plan(self, slots: Tensor, at: SlotNumbers, places: Tensor, block: Tensor) -> None:
        """Work out what is final of `block`, which stands at `places`, and each slot's next phase."""
        if self.is_diffusion:
            is_masked, size = block == self.model.mask_token_id, self.model.block_size
            first = torch.where(is_masked, self._range(size), self._number(size)).amin(1)
            final, phase = at.start + first, self._plan_step(slots, at, block, first)
        else:
            final, phase = places[:, 0] + 1, self._number(self.first_phase)
        self._finish(at, places, block, final, phase)

    def _finish(self, at: SlotNumbers, places: Tensor, block: Tensor, final: Tensor, phase: Tensor) -> None:
        """Note that what stands before `final` [B] is final, and the next phase, unless the answer has ended."""
        is_stop = self.is_stop[block] & (places >= at.prompt_length[:, None])
        end = torch.where(is_stop, places + 1, at.limit[:, None]).amin(1)  # the first stop token ends an answer
        at.final = final.minimum(end)
        at.phase = torch.where(final < end, phase, self._number(Phase.IDLE))

    def _plan_step(self, slots: Tensor, at: SlotNumbers, block: Tensor, first: Tensor) -> Tensor:
        """Set the sub-block that is next; return the phase. `first` [B]: masked place of the block, D if none is."""
        is_reused = (at.step % self.reuse.reuse_k != 0).long() if self.reuse.reuse_k > 1 else 0
        phase, at.offset = self.next_steps[at.has_cache, is_reused, first].unbind(1)
        if self.reuse.is_trimmed:
            at.num_active = self._active_rows(slots, at, block).sum(1)
        return phase


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return the rows [B, S] of `hidden` [B, T, C]: [B, S, C]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
