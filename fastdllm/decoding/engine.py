"""The decoder: requests take slots, and go through their own prefill, denoising steps and appends.

Slots never wait for each other: in every round the engine sorts them by the pass that they need next and runs one pass
for each kind, so a row's tokens do not depend on the batch around it. Who waits, comes and leaves is in session.py.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdllm.decoding.cache import SlotCache, fitting_slots
from fastdllm.decoding.clock import PassClock
from fastdllm.decoding.config import DecodeConfig, check_decoding
from fastdllm.decoding.drafts import DraftChooser
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.fused import FusedPasses, is_fused_by_itself
from fastdllm.decoding.graphs import GraphedPass
from fastdllm.decoding.policies import check_parameter
from fastdllm.decoding.reuse import ReuseConfig, row_bucket
from fastdllm.decoding.rows import Completion, Request, Row, check_prompt, common_prefix, stop_token_ids
from fastdllm.decoding.session import Session
from fastdllm.decoding.state import Phase, SlotState, to_device
from fastdllm.decoding.steps import Steps
from fastdllm.decoding.tables import KINDS, PASSES
from fastdllm.decoding.verify import VerifySteps
from fastdllm.model import BlockDiffusionLM

__all__ = ["Completion", "DecodeConfig", "Engine", "Request", "stop_token_ids"]
FREE_ROWS = 256  # 1.5B, H100, graphs (experiments/02_decode_speed): a pass over 256 rows takes 3.29 ms, two of 64 3.89
BLIND_ROWS = 64  # there 64 rows take 1.95 ms, 8 take 1.83: not worth the host's knowing which are needed
PREFILL_WIDTH = 256  # tokens of each prompt read in one pass


class Engine:
    """Owns the slots and their caches; promises that answers do not depend on the batch."""

    steps_class: Callable[..., Steps] | None = None  # None: the usual one for the options
    forward_class = PlainForward

    def __init__(
        self,
        model: BlockDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: str = "diffusion",
        decode: DecodeConfig | None = None,
        reuse: ReuseConfig | None = None,
        batch_size: int = 32,
        cache_bytes: int | None = None,
        free_rows: int | None = None,
        is_graphed: bool | None = None,
        is_fused: bool | None = None,
    ):
        """Set up decoding.

        Slots, their keys and values and the graphs stay for the next run, until `free` or until one needs larger ones.

        Args:
            mode: diffusion, or ar (token by token).
            batch_size: requests decoded at a time, at most.
            cache_bytes: memory for keys and values; None for a share of what the device has free.
            free_rows: rows up to which one pass over the whole blocks of all slots is quicker than two, one over blocks
                and one over sub-blocks, where slots need both; up to 64 of them are always computed so, and the host
                need not decide. None for 256 with CUDA graphs, 0 without.
            is_graphed: replay passes as CUDA graphs; None: on a GPU, which it needs.
            is_fused: run the fused forward pass in place of transformers' layers, with Triton's kernels on a GPU; None:
                on a GPU, if the model's heads have a size that the kernels know.
        Raises:
            ValueError: settings that are out of range or do not go together.
        """
        self.model, self.tokenizer, self.mode, self.batch_size = model.eval(), tokenizer, mode, batch_size
        self.decode, self.reuse = decode or DecodeConfig(), reuse or ReuseConfig()
        self.cache_bytes = cache_bytes
        is_cuda = model.device.type == "cuda"
        self.is_graphed = is_cuda if is_graphed is None else is_graphed
        self.is_fused = is_fused_by_itself(model) if is_fused is None else is_fused
        self.free_rows = FREE_ROWS * self.is_graphed if free_rows is None else free_rows
        self.stop_ids = stop_token_ids(tokenizer)
        self.seconds = 0.0
        """Inside run, prefill included; without what follows."""
        self.capture_seconds = 0.0
        """Spent on recording CUDA graphs, and on compiling their kernels where that was never done before."""
        self.prefill_clock = PassClock(model.device)
        self.is_busy = False
        """Whether a run has begun and not ended."""
        self.state: SlotState | None = None
        self._skipped: list[Row] = []
        self._passes: dict[tuple, GraphedPass] = {}
        self._drafts = DraftChooser(self.decode.draft_plan) if self.decode.is_verified else None
        self._check()

    @property
    def decode_seconds(self) -> float:
        """`seconds` without prefill; within a run, without the prefill that has ended by now."""
        return self.seconds - self.prefill_clock.read()

    @property
    def _reuses(self) -> bool:
        return self.reuse.is_on or self.reuse.is_trimmed

    @property
    def _is_token_wise(self) -> bool:
        """Whether every row after prefill is a token's, or hangs on one: no blocks."""
        return self.mode == "ar" or self.decode.is_verified

    def _check(self) -> None:
        check_settings(self.model, self.mode, self.decode, self.reuse)
        if self.is_graphed and self.model.device.type != "cuda":
            raise ValueError(f"is_graphed needs a model on a GPU, this one is on {self.model.device}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}.")

    def run(self, requests: Iterable[Request], skip: Collection[int] = ()) -> Iterator[Completion]:
        """Answer every request but those whose indices are in `skip`; completions come as they finish, in any order.

        What is skipped changes no other answer and no count: the common prefix stays that of all requests.
        """
        rows = [self._row(index, request) for index, request in enumerate(requests)]
        self._skipped = [row for row in rows if row.index in skip]
        for row in self._serve([row for row in rows if row.index not in skip]):
            if row.is_finished:
                yield row.completion(self.tokenizer)

    def stream(self, request: Request) -> Iterator[list[int]]:
        """Yield the final tokens of one request as they become final; no token is ever taken back."""
        shown = 0
        for row in self._serve([self._row(0, request)]):
            if len(row.tokens) > shown:
                yield row.tokens[shown:]
                shown = len(row.tokens)

    def open(self, most_tokens: int) -> Session:
        """Return a session: requests are given to it, and dropped, while it runs.

        Args:
            most_tokens: of one request, prompt and answer.
        Raises:
            RuntimeError: the engine is busy already.
        """
        return Session(self, most_tokens=most_tokens)

    def _row(self, index: int, request: Request) -> Row:
        check_prompt(f"the prompt of request {index}", request.prompt, self.model.mask_token_id)
        if request.parameter is not None:
            if self.mode == "ar":
                raise ValueError(f"the parameter of request {index} has no effect token by token; leave it out.")
            check_parameter(self.decode.policy, request.parameter)
        return Row(index, request, self.stop_ids)

    def _serve(self, rows: list[Row]) -> Iterator[Row]:
        """Decode the rows, the first one first; yield a row whenever it has moved on."""
        try:
            with Session(self, rows) as session:
                while session.has_work:
                    yield from session.round()
        finally:
            self._skipped = []

    def _set_up(self, waiting: Collection[Row]) -> None:
        """Make sure of as many slots as the batch and the memory allow, each long enough for any of the rows."""
        longest = max(waiting, key=lambda row: row.limit)
        prefix = common_prefix([row.request for row in (*waiting, *self._skipped)], self.model.block_size)
        wanted = min(self.batch_size, len(waiting))
        self._make_room(f"request {longest.index}", longest.limit, wanted, has_prefix=bool(prefix))
        self._read_prefix(prefix, self.num_slots)

    def _make_room(self, name: str, most_tokens: int, wanted: int, has_prefix: bool = False) -> None:
        """Make sure of up to `wanted` slots of so many tokens; `name` is what needs them, for the message.

        Raises:
            ValueError: not even one slot fits.
        """
        size = self.model.block_size
        needed = (wanted, -(-most_tokens // size) * size, 2 if has_prefix else 1)  # one is spare
        if self.state is not None and any(need > have for need, have in zip(needed, self._allocated, strict=True)):
            self.free()
        if self.state is None:
            self._allocated = needed
            self._allocate(name, most_tokens, *needed)
        # where rows are free, one kind of pass serves all slots, so the host need not know which pass each one needs
        self._is_block_wise = not self._is_token_wise and not self._reuses
        self._is_universal = self._is_block_wise and self.num_slots * size <= min(self.free_rows, BLIND_ROWS)
        self._lag = 1 if self.is_graphed and (self._is_universal or self._is_token_wise) else 0
        self._prefix_length = 0

    def _allocate(self, name: str, most_tokens: int, wanted: int, capacity: int, extra: int) -> None:
        model, size = self.model, self.model.block_size
        plans = self._drafts.plans if self._drafts else ()
        num_scratch = max((plan.num_drafting for plan in plans), default=0)
        self._most_new = max((plan.length + 1 for plan in plans), default=size)  # tokens of a slot that a pass may give
        fit = fitting_slots(model, capacity, num_scratch, extra, self.cache_bytes)
        if fit.num_slots < 1:
            raise ValueError(
                f"{name} may grow to {most_tokens} tokens, prompt and answer, and needs "
                f"{fit.needed_bytes:,} bytes of keys and values; {fit.allowed_bytes:,} are allowed, which "
                f"{fit.most_tokens} tokens fit into: shorten it, or raise cache_bytes."
            )
        self.num_slots = num_slots = min(wanted, fit.num_slots)
        width = capacity + (self._most_new if self._drafts else 0)  # what is drafted may reach behind the limit
        self.state = SlotState(num_slots + extra, width, size, model.mask_token_id, model.device)
        self.cache = SlotCache(model, num_slots + extra, capacity, num_scratch)
        self.forward = (FusedPasses if self.is_fused else self.forward_class)(model, self.cache)
        options = {"max_drafts": self._most_new - 1} if self._drafts else {}
        self.steps = (self.steps_class or (VerifySteps if self._drafts else Steps))(
            model,
            self.state,
            self.cache,
            self.forward,
            is_diffusion=not self._is_token_wise,
            decode=self.decode,
            reuse=self.reuse,
            stop_ids=self.stop_ids,
            **options,
        )
        self._passes = {}
        self._pool = torch.cuda.graph_pool_handle() if self.is_graphed else None

    def free(self) -> None:
        """Give the memory of slots and graphs back."""
        self.state = self.cache = self.forward = self.steps = self._pool = None
        self._passes = {}

    def _read_prefix(self, prefix: list[int], slot: int) -> None:
        """Read the common prefix once; admitted rows copy its keys and values."""
        if not prefix:
            return
        self._prefix_length, self._prefix_slot = len(prefix), slot
        row = Row(-1, Request(prompt=prefix, max_new_tokens=1), self.stop_ids, slot=slot, start=len(prefix))
        self._put(row, prefilled=0)
        while row.phase == Phase.PREFILL:
            self._prefill([row])
        self.state.release(slot)

    def _admit(self, row: Row, kept: int) -> None:
        """Put a row into its slot, whose first `kept` places hold keys and values of its first tokens already."""
        length, size = len(row.request.prompt), self.model.block_size
        row.start = length - 1 if self._is_token_wise else length // size * size
        # the last block of a prompt of whole blocks is read again: it gives the next token
        most = row.start if row.start < length else row.start - size
        row.cached_tokens, row.prefilled = min(kept, most), min(max(kept, self._prefix_length), most)
        if row.prefilled > row.cached_tokens:
            self.cache.copy_prefix(self._prefix_slot, row.slot, row.prefilled)
        self._put(row, row.prefilled)
        if row.start <= row.prefilled:
            self.steps.begin(to_device([row.slot], self.model.device))
            row.phase = self.steps.first_phase

    def _put(self, row: Row, prefilled: int) -> None:
        request = row.request
        self.state.admit(
            row.slot,
            request.prompt,
            parameter=self.decode.parameter if request.parameter is None else request.parameter,
            limit=row.limit,
            prefilled=prefilled,
            start=row.start,
            seed=request.seed,
        )

    def _advance(self, rows: list[Row]) -> None:
        """Run the next pass of every row: one pass for each kind that is needed."""
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            kind = KINDS[row.phase]
            kinds.setdefault("universal" if self._is_universal and kind != "prefill" else kind, []).append(row)
        if self._is_block_wise and {"block", "sub_block"} <= kinds.keys():
            members = kinds["block"] + kinds["sub_block"]
            if len(members) * self.model.block_size <= self.free_rows:
                kinds["universal"] = members
                del kinds["block"], kinds["sub_block"]
        for kind, members in kinds.items():
            if kind == "prefill":
                self._prefill(members)
            else:
                # ahead of what the host knows: a round not followed yet, the block behind an appended one, drafts
                ahead = (self._lag + self.decode.fuse_append + (kind == "verify")) * self._most_new
                self._see(max(row.start for row in members) + 1 + ahead)
                if self._drafts:
                    self._pass(members, self.steps.verify, plan=self._drafts.plan(len(members)))
                elif kind == "sub_block" and self.reuse.is_trimmed:
                    num_rows = row_bucket(sum(row.num_active for row in members))
                    self._pass(members, self.steps.active_rows, num_rows=num_rows)
                else:
                    name, options = PASSES[kind]
                    self._pass(members, getattr(self.steps, name), **options)

    def _prefill(self, rows: list[Row]) -> None:
        longest = max(row.start - row.prefilled for row in rows)
        width = min(PREFILL_WIDTH, 1 << (longest - 1).bit_length())
        self._see(max(row.start for row in rows))
        self.prefill_clock.run(self._prepared(rows, self.steps.prefill, width=width))
        for row in rows:
            row.prefilled += width
            if row.prefilled >= row.start:
                row.phase = self.steps.first_phase

    def _see(self, length: int) -> None:
        """Tell a forward pass without graphs that no row sees more than `length` places, in whole blocks."""
        if not self.is_graphed:
            length = max(1, -(-length // self.model.block_size)) * self.model.block_size
            self.forward.num_visible = min(length, self.cache.capacity)

    def _pass(self, rows: list[Row], run: Callable[..., Tensor | None], **options: int) -> Tensor | None:
        return self._prepared(rows, run, **options)()

    def _prepared(self, rows: list[Row], run: Callable, **options: int) -> Callable[[], Tensor | None]:
        """Return a pass over the rows that has been recorded, if passes are, and is still to be run."""
        name = (run.__name__, *options.items())
        if name not in self._passes:
            self._passes[name] = GraphedPass(partial(run, **options), self.state.spare, self.model.device, self._pool)
        graphed, slots = self._passes[name], [row.slot for row in rows]
        self.capture_seconds += graphed.prepare(len(slots))
        return partial(graphed, slots)

    def _report(self, slots: Tensor) -> Tensor:
        return self.state.report(2 * self._most_new)

    def _drafted(self, slots: Tensor) -> Tensor:
        return self.steps.drafted()


def check_settings(model: BlockDiffusionLM, mode: str, decode: DecodeConfig, reuse: ReuseConfig) -> None:
    """Raise ValueError for settings that the model cannot have, or that do not go together."""
    if mode not in ("diffusion", "ar"):
        raise ValueError(f"mode must be diffusion or ar, got {mode!r}.")
    check_decoding(
        mode,
        decode,
        reuse,
        block_size=model.block_size,
        num_layers=model.num_layers,
        context_attention=model.context_attention,
        has_adapter=model.gate is not None,
    )
