"""The decoder: requests wait in a queue, take slots, and every row goes through its own prefill, denoising and appends.

Rows never wait for each other: each iteration sorts the rows by the pass that they need next and runs one forward pass
for each kind, so a row's tokens do not depend on the batch around it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdllm.decoding.cache import SlotCache
from fastdllm.decoding.policies import accept_by_threshold, propose
from fastdllm.decoding.reuse import LayerStore, ReuseConfig
from fastdllm.decoding.rows import Completion, Request, Row
from fastdllm.masks import decode_attention_mask
from fastdllm.model import BlockDiffusionLM

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a block is unmasked."""

    sub_block_size: int = 8
    """Tokens; divides the block size."""
    threshold: float = 0.9
    """Confidence in (0, 1] above which a proposal is accepted; the best one always is, so 1.0 means one token per
    denoising step."""
    use_block_cache: bool = True
    """Use the sub-block cache (published name): later steps of a sub-block compute only its own rows. Approximate; the
    block cache itself is exact and always on."""
    temperature: float = 0.0
    """0 is greedy; above 0 proposals are drawn at this temperature."""
    top_p: float = 0.95
    """Probability mass in (0, 1] of the nucleus that is drawn from when temperature is above 0."""

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"decode.threshold must be in (0, 1], got {self.threshold}; 1.0 is one token per step.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"decode.temperature must be 0 or more and decode.top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}; temperature 0 is greedy."
            )
        if self.sub_block_size < 1:
            raise ValueError(f"decode.sub_block_size must be 1 or more, got {self.sub_block_size}; try 8.")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's eos, and ChatML's ends where the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    return frozenset({tokenizer.eos_token_id} | {vocabulary[name] for name in STOP_TOKENS if name in vocabulary})


class Engine:
    """Owns the slots and their caches; promises that greedy answers do not depend on the batch."""

    def __init__(
        self,
        model: BlockDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: str = "diffusion",
        decode: DecodeConfig | None = None,
        reuse: ReuseConfig | None = None,
        batch_size: int = 32,
    ):
        self.model, self.tokenizer, self.mode, self.batch_size = model.eval(), tokenizer, mode, batch_size
        self.decode, self.reuse = decode or DecodeConfig(), reuse or ReuseConfig()
        self.stop_ids = stop_token_ids(tokenizer)
        self.seconds = 0.0  # inside run, prefill included
        self.prefill_seconds = 0.0
        self._check()

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    def _check(self) -> None:
        block_size, sub_block_size = self.model.block_size, self.decode.sub_block_size
        if self.mode not in ("diffusion", "ar"):
            raise ValueError(f"mode must be diffusion or ar, got {self.mode!r}.")
        if block_size % sub_block_size:
            raise ValueError(
                f"decode.sub_block_size must divide the block size ({block_size}), got {sub_block_size}; try 8 or 16."
            )
        if self.reuse.reuse_k > 1 and (self.mode == "ar" or not self.decode.use_block_cache):
            raise ValueError(
                f"reuse_k {self.reuse.reuse_k} needs diffusion decoding with use_block_cache true: without the "
                "sub-block cache every denoising step is a full pass and nothing is ever reused; set reuse_k 1 or the "
                "cache on."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}.")

    @torch.no_grad()
    def run(self, requests: list[Request]) -> Iterator[Completion]:
        """Answer every request; completions come as they finish, each with its request's index."""
        waiting = [self._row(index, request) for index, request in enumerate(requests)][::-1]
        if not waiting:
            return
        num_slots = min(self.batch_size, len(waiting))
        capacity = max(row.last_place(self.model.block_size) for row in waiting)
        self.cache = SlotCache(self.model, num_slots, capacity)
        self.store = LayerStore(self.model.num_layers, self.reuse, num_slots, self.model.block_size)
        free, active = list(range(num_slots)), []
        while waiting or active:
            started = time.perf_counter()
            admitted = [waiting.pop() for _ in range(min(len(free), len(waiting)))]
            for row in admitted:
                row.slot = free.pop()
            self._prefill(admitted)
            self.prefill_seconds += self._elapsed(started) if admitted else 0.0
            active += admitted
            self._advance(active)
            finished = [row for row in active if row.is_finished]
            active = [row for row in active if not row.is_finished]
            free += [row.slot for row in finished]
            self.seconds += self._elapsed(started)
            yield from (row.completion(self.tokenizer) for row in finished)

    @torch.no_grad()
    def stream(self, request: Request) -> Iterator[list[int]]:
        """Yield the final tokens of one request as they become final; no token is ever taken back."""
        row = self._row(0, request)
        row.slot = 0
        self.cache = SlotCache(self.model, 1, row.last_place(self.model.block_size))
        self.store = LayerStore(self.model.num_layers, self.reuse, 1, self.model.block_size)
        self._prefill([row])
        shown = 0
        while not row.is_finished:
            self._advance([row])
            final = row.final_tokens()
            if len(final) > shown:
                yield final[shown:]
                shown = len(final)

    def _row(self, index: int, request: Request) -> Row:
        if self.model.mask_token_id in request.prompt:
            raise ValueError(
                f"the prompt of request {index} holds the mask token (id {self.model.mask_token_id}), which stands for "
                "what is still to be written; take it out."
            )
        return Row(index, request, self.model.block_size, self.model.mask_token_id, self.stop_ids, self.mode)

    def _elapsed(self, started: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - started

    def _prefill(self, rows: list[Row]) -> None:
        """Read the whole blocks of the prompts (AR: all but the last token) into the block cache."""
        rows = [row for row in rows if row.finished_length > 0]
        if not rows:
            return
        width = max(row.finished_length for row in rows)
        tokens = [row.request.prompt[: row.finished_length] for row in rows]
        padded = self._tensor([part + [0] * (width - len(part)) for part in tokens])  # [R, T]
        hidden = self._forward(rows, padded, [[0]] * len(rows), is_clean=True)
        if self.mode == "diffusion":
            ends = self._tensor([row.finished_length - 1 for row in rows])
            first = self.model.logits(hidden[torch.arange(len(rows)), ends]).argmax(-1).tolist()
            for row, token in zip(rows, first, strict=True):
                row.start_block(token)
        for row in rows:
            row.prefill_passes += 1

    def _advance(self, rows: list[Row]) -> None:
        """Run the next pass of every row: one forward pass for each kind that is needed."""
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            kinds.setdefault(self._next_pass(row), []).append(row)
        for kind, members in kinds.items():
            if kind == "ar":
                self._ar_step(members)
            elif kind == "append":
                self._append(members)
            else:
                self._denoise(members, is_full=kind == "full", is_reused=kind == "reuse")
            for row in members:
                row.check_finished(self.tokenizer)

    def _next_pass(self, row: Row) -> str:
        if self.mode == "ar":
            return "ar"
        offset = row.sub_block_offset(self.decode.sub_block_size)
        if offset is None:
            return "append"
        if not self.decode.use_block_cache or not row.has_sub_block_cache or row.is_masked(offset):
            return "full"
        return "sub_block" if row.denoising_step % self.reuse.reuse_k == 0 else "reuse"

    def _ar_step(self, rows: list[Row]) -> None:
        tokens = self._tensor([[row.last_token()] for row in rows])
        hidden = self._forward(rows, tokens, [[row.finished_length] for row in rows], is_clean=True)
        drawn, _ = self._propose(rows, hidden)
        for row, token in zip(rows, drawn[:, 0].tolist(), strict=True):
            row.add_token(token)

    def _append(self, rows: list[Row]) -> None:
        """Put the finished block into the block cache; its last row gives the next block's first token, greedily."""
        tokens = self._tensor([row.block for row in rows])
        hidden = self._forward(rows, tokens, [[row.finished_length] for row in rows], is_clean=True)
        following = self.model.logits(hidden[:, -1]).argmax(-1).tolist()
        for row, token in zip(rows, following, strict=True):
            row.append_passes += 1
            row.finish_block()
            row.start_block(token)

    def _denoise(self, rows: list[Row], *, is_full: bool, is_reused: bool) -> None:
        """One denoising step over the whole block or the current sub-block of each row, then one unmasking."""
        size = self.decode.sub_block_size
        offsets = [row.sub_block_offset(size) for row in rows]
        firsts = [0] * len(rows) if is_full else offsets
        width = self.model.block_size if is_full else size
        tokens = [row.block[first : first + width] for row, first in zip(rows, firsts, strict=True)]
        starts = [[row.finished_length + first] for row, first in zip(rows, firsts, strict=True)]
        inside = self._tensor([[first] for first in firsts]) + torch.arange(width, device=self.model.device)
        slots = self._tensor([row.slot for row in rows])
        self.store.select(slots, inside, is_reused=is_reused, is_full=is_full)
        calls = self.model.layer_calls
        hidden = self._forward(rows, self._tensor(tokens), starts, is_clean=False)
        # token shift: the proposal for place p comes from row p - 1; place 0 of a block is never masked
        places = self._tensor([[offset - first] for offset, first in zip(offsets, firsts, strict=True)])
        sources = (places + torch.arange(size, device=self.model.device) - 1).clamp(min=0)  # [R, S]
        hidden = hidden.gather(1, sources[..., None].expand(-1, -1, hidden.shape[-1]))  # [R, S, C]
        token, confidence = self._propose(rows, hidden)
        is_candidate = self._tensor([row.block[o : o + size] for row, o in zip(rows, offsets, strict=True)])
        is_candidate = is_candidate == self.model.mask_token_id
        is_accepted = accept_by_threshold(confidence, is_candidate, self.decode.threshold)
        results = zip(rows, offsets, token.tolist(), is_accepted.tolist(), strict=True)
        for row, offset, tokens_of_row, accepted in results:
            row.unmask(offset, tokens_of_row, accepted)
            row.count_denoising_step(is_full=is_full, layers_run=self.model.layer_calls - calls)

    def _forward(self, rows: list[Row], tokens: Tensor, starts: list[list[int]], *, is_clean: bool) -> Tensor:
        """Run one pass over tokens [R, T] at positions starts (R lists of one) + 0..T-1; return hidden [R, T, C].

        A clean pass attends as the model's context does (causally in AR mode); a denoising pass sees its whole block.
        """
        positions = self._tensor(starts) + torch.arange(tokens.shape[1], device=self.model.device)  # [R, T]
        last = max(start for (start,) in starts) + tokens.shape[1] - 1
        num_visible = (last // self.model.block_size + 1) * self.model.block_size
        places = torch.arange(num_visible, device=self.model.device).expand(len(rows), -1)  # [R, S]
        context = "causal" if self.mode == "ar" else self.model.context_attention if is_clean else "block"
        attention_mask = decode_attention_mask(positions, places, self.model.block_size, context)
        self.cache.select(self._tensor([row.slot for row in rows]), positions, num_visible)
        calls = self.model.layer_calls
        reuse = None if is_clean else self.store
        hidden = self.model.hidden_states(tokens, positions, attention_mask, self.cache, reuse)
        if is_clean:
            for row in rows:
                row.layers_run += self.model.layer_calls - calls
        return hidden

    def _propose(self, rows: list[Row], hidden: Tensor) -> tuple[Tensor, Tensor]:
        uniform = None
        if self.decode.temperature > 0:  # each row draws from its own generator, so the batch does not matter
            draws = [torch.rand(hidden.shape[1], generator=row.generator) for row in rows]
            uniform = torch.stack(draws).to(hidden.device)
        return propose(self.model.logits(hidden), self.decode.temperature, self.decode.top_p, uniform)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
