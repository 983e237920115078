"""One request on its way through the engine: its current block, what is final, and every pass that it took."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase


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


@dataclass
class Row:
    """State of one request. Owns its tokens; the engine owns caches and passes."""

    index: int
    request: Request
    block_size: int
    mask_token_id: int
    stop_ids: frozenset[int]
    mode: str
    slot: int = -1
    tokens: list[int] = field(default_factory=list)  # prompt and finished blocks, and in AR mode every token
    block: list[int] = field(default_factory=list)  # the current block, some of it masked
    finished_length: int = 0  # places in the block cache
    denoising_step: int = 0  # in this block, for reuse
    has_sub_block_cache: bool = False
    is_finished: bool = False
    final: list[int] = field(default_factory=list)  # new tokens that nothing can change any more
    searched_tokens: int = 0  # new tokens already searched for stop strings
    computed_tokens: int = 0
    prefill_passes: int = 0
    denoise_passes: int = 0
    append_passes: int = 0
    full_passes: int = 0
    layers_run: int = 0

    def __post_init__(self):
        prompt, size = self.request.prompt, self.block_size
        self.generator = torch.Generator().manual_seed(self.request.seed)
        self.finished_length = len(prompt) - 1 if self.mode == "ar" else len(prompt) // size * size
        self.tokens = list(prompt) if self.mode == "ar" else list(prompt[: self.finished_length])
        if self.mode == "diffusion":
            self._fill_block(prompt[self.finished_length :])

    @property
    def limit(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens

    def last_place(self, block_size: int) -> int:
        """Return how many cache places this row can ever need."""
        return -(-self.limit // block_size) * block_size

    def _fill_block(self, known: list[int]) -> None:
        self.block = list(known) + [self.mask_token_id] * (self.block_size - len(known))
        self.denoising_step, self.has_sub_block_cache = 0, False

    def start_block(self, token: int) -> None:
        """Give an empty block its first token, from the pass that read the block before it."""
        if len(self.request.prompt) > self.finished_length:  # the prompt goes on in this block
            return
        self._fill_block([token])
        self.computed_tokens += 1

    def finish_block(self) -> None:
        self.tokens += self.block
        self.finished_length += self.block_size

    def is_masked(self, place: int) -> bool:
        return self.block[place] == self.mask_token_id

    def sub_block_offset(self, size: int) -> int | None:
        """Return where the first sub-block that still holds a mask token starts, or None if the block is done."""
        if self.mask_token_id not in self.block:
            return None
        return self.block.index(self.mask_token_id) // size * size

    def unmask(self, offset: int, tokens: list[int], is_accepted: list[bool]) -> None:
        for place, (token, accepted) in enumerate(zip(tokens, is_accepted, strict=True), start=offset):
            if accepted:
                self.block[place] = token
                self.computed_tokens += 1

    def count_denoising_step(self, *, is_full: bool, layers_run: int) -> None:
        self.denoise_passes += 1
        self.full_passes += is_full
        self.layers_run += layers_run
        self.denoising_step += 1
        self.has_sub_block_cache |= is_full

    def last_token(self) -> int:
        return self.tokens[-1]

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        self.finished_length += 1
        self.computed_tokens += 1
        self.denoise_passes += 1

    def final_tokens(self) -> list[int]:
        """Return the new tokens that nothing can change any more, through the first stop token or the limit."""
        start = len(self.request.prompt) + len(self.final)  # places before it are final
        places = self.tokens[start:] + self.block[max(0, start - len(self.tokens)) :]
        for token in places:
            has_ended = bool(self.final) and self.final[-1] in self.stop_ids
            if has_ended or len(self.final) == self.request.max_new_tokens or token == self.mask_token_id:
                break
            self.final.append(token)
        return self.final

    def check_finished(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finish at the first final stop token, at the limit, or once a final text holds a stop string."""
        final = self.final_tokens()
        has_stop = bool(final) and final[-1] in self.stop_ids
        self.is_finished = has_stop or len(final) == self.request.max_new_tokens
        if not self.is_finished and self.request.stop_strings and len(final) > self.searched_tokens:
            longest = max(len(stop.encode()) for stop in self.request.stop_strings)  # a token holds a byte or more
            text = tokenizer.decode(final[max(0, self.searched_tokens - longest) :], skip_special_tokens=False)
            self.is_finished = any(stop in text for stop in self.request.stop_strings)
            self.searched_tokens = len(final)

    def completion(self, tokenizer: PreTrainedTokenizerBase) -> Completion:
        tokens = self.final_tokens()
        kept = tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens
        text = tokenizer.decode(kept, skip_special_tokens=False)
        for stop in self.request.stop_strings:
            text = text.split(stop, 1)[0]
        return Completion(
            index=self.index,
            tokens=tokens,
            text=text,
            counted_tokens=len(tokens),
            computed_tokens=self.computed_tokens,
            prefill_passes=self.prefill_passes,
            denoise_passes=self.denoise_passes,
            append_passes=self.append_passes,
            full_passes=self.full_passes,
            layers_run=self.layers_run,
        )
