"""A request, its answer, and how the host follows it on its way through the engine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastdllm.decoding.pieces import cut_text
from fastdllm.decoding.state import COUNTERS, Phase

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued."""

    prompt: list[int]
    """Token ids, at least one."""
    max_new_tokens: int
    """Limit on new tokens, 1 or more."""
    stop_strings: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    seed: int = 0
    """Seed of this request's draws when the temperature is above 0."""
    parameter: float | None = None
    """The policy's number, such as the threshold, for this request; None for the engine's."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("a request's prompt must hold at least one token, got none.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer and what it took. Passes are those of this row, whatever the batch around it."""

    index: int
    """Position of the request in the list."""
    tokens: list[int]
    """New tokens through the first stop token (included) or the limit."""
    text: str
    """The answer without the stop token, cut before the first stop string."""
    counted_tokens: int
    """Length of `tokens`."""
    computed_tokens: int
    """Every token unmasked, also those after the stop or beyond the limit."""
    prefill_passes: int
    denoise_passes: int
    """Denoising steps, reuse steps too; in AR mode the single-token passes."""
    append_passes: int
    full_passes: int
    """Denoising passes over the whole block."""
    layers_run: int
    """Layers run over all passes of this row."""
    checked_drafts: int = 0
    """Policy verified: drafts compared with what the model chooses: of each pass, those up to the first wrong one."""
    accepted_drafts: int = 0
    """Those that were right."""
    rows_run: int | None = None
    """Rows computed, each counted once for every layer that it ran through, over all passes; None: not counted."""


@dataclass(eq=False)
class Row:
    """One request as the host follows it: where it runs, its final tokens so far, and what the device counted."""

    index: int
    request: Request
    stop_ids: frozenset[int]
    slot: int = -1
    phase: int = Phase.PREFILL
    num_active: int = 0  # rows of its next sub-block step, if active rows alone are computed
    start: int = 0  # where its current block begins, at least
    prefilled: int = 0  # places of the prompt that were read, or are about to be
    tokens: list[int] = field(default_factory=list)  # new tokens that nothing can change any more
    searched_tokens: int = 0  # new tokens already searched for stop strings
    counts: list[int] = field(default_factory=list)  # COUNTERS
    is_finished: bool = False  # or dropped
    cached_tokens: int = 0  # of the prompt, whose keys and values an earlier request of the session left in the slot
    is_watched: bool = False  # whether `draft` is wanted
    draft: list[int | None] = field(default_factory=list)  # places of the block behind the final ones; None: masked

    @property
    def limit(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def num_clean(self) -> int:
        """Places from the beginning whose keys and values are exact, and that no pass will write again."""
        return min(self.prefilled, self.start) if self.phase == Phase.PREFILL else self.start

    def restart(self) -> None:
        """Forget all but the request."""
        self.__init__(self.index, self.request, self.stop_ids, is_watched=self.is_watched)

    def follow(self, phase: int, final: int, counts: list[int], tail: np.ndarray, tokenizer: PreTrainedTokenizerBase):
        """Take in what the device reported: `tail` are the tokens before the place `final`."""
        fresh = final - len(self.request.prompt) - len(self.tokens)
        assert fresh <= len(tail), "the host lost tokens: it follows the device too rarely"
        self.tokens += tail[len(tail) - fresh :].tolist() if fresh > 0 else []
        self.phase, self.counts = phase, counts
        self.is_finished = phase == Phase.IDLE or self._has_stop_string(tokenizer)

    def look(self, drafted: list[int], mask_token_id: int) -> bool:
        """Take in what the device drafted, as Steps.drafted says; return whether it is news."""
        seen = [] if self.is_finished else [token for token in drafted if token >= 0]
        before, self.draft = self.draft, [None if token == mask_token_id else token for token in seen]
        return self.draft != before

    @cached_property
    def _longest_stop(self) -> int:
        """Tokens that the longest stop string can be: each holds a byte or more."""
        return max(len(stop.encode()) for stop in self.request.stop_strings)

    def _has_stop_string(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        stop_strings, searched = self.request.stop_strings, self.searched_tokens
        if not stop_strings or len(self.tokens) == searched:
            return False
        text = tokenizer.decode(self.tokens[max(0, searched - self._longest_stop) :], skip_special_tokens=False)
        self.searched_tokens = len(self.tokens)
        return any(stop in text for stop in stop_strings)

    def completion(self, tokenizer: PreTrainedTokenizerBase) -> Completion:
        kept = self.tokens[:-1] if self.tokens and self.tokens[-1] in self.stop_ids else self.tokens
        text = cut_text(tokenizer.decode(kept, skip_special_tokens=False), self.request.stop_strings)
        counts = dict(zip(COUNTERS, self.counts, strict=True))
        return Completion(index=self.index, tokens=self.tokens, text=text, counted_tokens=len(self.tokens), **counts)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's eos, and ChatML's ends where the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    return frozenset({tokenizer.eos_token_id} | {vocabulary[name] for name in STOP_TOKENS if name in vocabulary})


def check_prompt(name: str, prompt: Sequence[int], mask_token_id: int) -> None:
    """Raise ValueError if the prompt, called `name`, holds the mask token."""
    if mask_token_id in prompt:
        raise ValueError(
            f"{name} holds the mask token (id {mask_token_id}), which stands for what is still to be written; take it "
            "out."
        )


def common_prefix(requests: Sequence[Request], block_size: int) -> list[int]:
    """Return the tokens, in whole blocks, with which the prompts of all requests begin; none for a single request."""
    shared = os.path.commonprefix([request.prompt for request in requests]) if len(requests) > 1 else []
    return shared[: len(shared) // block_size * block_size]
