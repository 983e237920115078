"""The published decoders from their description, quirks included: what our engine is checked against.

Greedy, in float32; shares the model's layers with the engine and nothing else. Argument names and defaults are the
published ones. Quirks kept: a prompt of exactly one block is never read, budgets count whole blocks, one row's mask
refreshes the sub-block cache of all rows, finished rows leave at block ends, a stop token from a commit goes unnoticed
in a batch, the mask token can be proposed. Source: method.md 3.1 to 3.5; the numbered defects are those of 3.6.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdllm.model import BlockDiffusionLM


class MaskProposed(RuntimeError):
    """Every proposal of a step was the mask token: the published loop never ends (defect 4)."""


class CacheNeverFilled(TypeError):
    """All rows finished in the first block without a prefill: trimming the empty cache fails (defect 2)."""


@dataclass
class Trace:
    """The decisions behind each row's tokens, and how near each was to going the other way."""

    steps: dict[int, list[tuple[list[int], float]]] = field(default_factory=dict)
    """Row -> (places unmasked, margin) of each denoising step."""
    commits: dict[tuple[int, int], float] = field(default_factory=dict)
    """(row, place) -> top-2 probability margin of the token that a prefill or commit gave."""
    mask_rows: set[int] = field(default_factory=set)
    """Rows where a decision changes once the mask token cannot be proposed, as in our engine (defect 4)."""
    disturbed_rows: set[int] = field(default_factory=set)
    """Rows whose sub-block cache was refreshed only because another row needed it (defect 7)."""

    def margin(self, row: int, place: int, block_size: int) -> float:
        """Return the smallest margin of the decisions of the place's block until it was decided; inf if it never was.

        Earlier blocks do not matter: once their tokens are the same, so are the keys and values that they leave.
        """
        if (row, place) in self.commits:
            return self.commits[row, place]
        smallest = math.inf
        for places, margin in self.steps.get(row, []):
            if places[0] // block_size == place // block_size:
                smallest = min(smallest, margin)
                if place in places:
                    return smallest
        return math.inf


@dataclass
class KeyValues:
    """Keys and values of each layer, [B, G, S, E]: the prefix, and the current block's own. `use` says what a pass
    does: "commit" appends to the prefix, "full" keeps the whole block as its own, "sub" overwrites from `offset` on."""

    use: str = "commit"
    offset: int = 0
    prefix: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    own: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.prefix["key", 0].shape[2] if self.prefix else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self._update(("key", layer), key), self._update(("value", layer), value)

    def _update(self, name: tuple[str, int], fresh: Tensor) -> Tensor:
        before = [self.prefix[name]] if name in self.prefix else []
        if self.use == "full":
            self.own[name] = fresh.clone()
        if self.use == "sub":
            self.own[name][:, :, self.offset : self.offset + fresh.shape[2]] = fresh
            fresh = self.own[name]
        joined = torch.cat([*before, fresh], dim=2)
        if self.use == "commit":
            self.prefix[name] = joined
        return joined

    def keep_rows(self, is_kept: Tensor) -> None:
        """Drop the prefixes of the other rows of the batch."""
        if not self.prefix:
            raise CacheNeverFilled("object of type 'NoneType' has no len()")
        self.prefix = {name: tensor[is_kept] for name, tensor in self.prefix.items()}


@dataclass
class Decoder:
    """What `generate` and `batch_sample` share: passes, unmasking, and the cache of one call."""

    model: BlockDiffusionLM
    mask_id: int
    threshold: float
    block_size: int
    small_block_size: int
    use_block_cache: bool
    trace: Trace
    cache: KeyValues = field(default_factory=KeyValues)

    def _logits(self, tokens: Tensor, use: str, offset: int = 0) -> Tensor:
        """Run tokens [B, T] after the cached ones (method.md 3.1); return logits [B, T, V], mask token included."""
        prefix = self.cache.length
        queries = prefix + offset + torch.arange(tokens.shape[1], device=tokens.device)  # absolute positions
        keys = torch.arange(prefix + (self.block_size if use == "sub" else tokens.shape[1]), device=tokens.device)
        is_allowed = queries[:, None] // self.block_size >= keys // self.block_size  # [T, S]
        if use == "sub":
            is_allowed = torch.ones_like(is_allowed)
        self.cache.use, self.cache.offset = use, offset
        attention_mask = is_allowed.expand(len(tokens), 1, -1, -1)
        hidden = self.model.hidden_states(tokens, queries.expand(len(tokens), -1), attention_mask, self.cache)
        return self.model.qwen.lm_head(hidden).float()

    def _shifted_logits(self, tokens: Tensor, use: str, offset: int = 0) -> Tensor:
        """Return the logits shifted right by one inside the chunk; its first row keeps its own."""
        logits = self._logits(tokens, use, offset)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)

    def commit(self, tokens: Tensor, rows: list[int], place: int) -> Tensor:
        """Append clean blocks [B, T] to the prefix; return the argmax of the last rows, [B]: the tokens at `place`."""
        probability = self._logits(tokens, "commit")[:, -1].softmax(-1)
        best = probability.topk(2)
        for row, token, (first, second) in zip(rows, best.indices[:, 0].tolist(), best.values.tolist(), strict=True):
            self.trace.commits[row, place] = first - second
            self.trace.mask_rows |= {row} if token == self.mask_id else set()
        return best.indices[:, 0]

    def extend(self, tokens: Tensor) -> Tensor:
        """Fill up to the next multiple of the block size with mask tokens; a whole block if already aligned."""
        missing = self.block_size - tokens.shape[1] % self.block_size
        return torch.nn.functional.pad(tokens, (0, missing), value=self.mask_id)

    def denoising_steps(self, tokens: Tensor, rows: list[int]) -> Iterator[None]:
        """Denoise the last block in place, sub-block by sub-block from left to right; yield after each step."""
        self.cache.own = {}
        block = tokens[:, -self.block_size :]
        for offset in range(0, self.block_size, self.small_block_size):
            while (block[:, offset : offset + self.small_block_size] == self.mask_id).any():
                self._denoise(tokens, offset, rows)
                yield

    def _denoise(self, tokens: Tensor, offset: int, rows: list[int]) -> None:
        """One denoise forward over the last block of tokens [B, T], then one unmasking in place (3.2, 3.4)."""
        block, size = tokens[:, -self.block_size :], self.small_block_size
        needs_refresh = block[:, offset] == self.mask_id  # [B]
        if not self.use_block_cache or not self.cache.own or needs_refresh.any():
            if self.use_block_cache and self.cache.own:  # a refresh that some rows would not have had alone
                is_disturbed = ~needs_refresh & (block == self.mask_id).any(dim=1)
                self.trace.disturbed_rows |= {rows[index] for index in is_disturbed.nonzero().flatten().tolist()}
            logits = self._shifted_logits(block, "full")[:, offset : offset + size]
        else:
            logits = self._shifted_logits(block[:, offset : offset + size], "sub", offset)
        part = block[:, offset : offset + size]  # a view: writing it writes tokens
        is_candidate = part == self.mask_id  # [B, S]
        proposal, is_accepted = unmask(logits, is_candidate, self.threshold)
        start = tokens.shape[1] - self.block_size + offset
        self._note(logits, proposal, is_candidate, is_accepted, rows, start)
        if (proposal[is_accepted] == self.mask_id).all():
            raise MaskProposed(f"only mask tokens proposed from position {start} on")
        part[is_accepted] = proposal[is_accepted]

    def _note(self, logits, proposal, is_candidate, is_accepted, rows: list[int], start: int) -> None:
        """Trace this step: places, margins, and the rows whose decisions hang on the mask token."""
        without = logits.clone()
        without[..., self.mask_id] = -torch.inf
        other, is_other = unmask(without, is_candidate, self.threshold)
        differs = (is_other != is_accepted) | (is_accepted & (other != proposal))  # [B, S]
        for index, row in enumerate(rows):
            if not is_candidate[index].any():
                continue
            self.trace.mask_rows |= {row} if differs[index].any() else set()
            margin = step_margin(logits[index], is_candidate[index], is_accepted[index], self.threshold)
            places = (start + is_accepted[index].nonzero().flatten()).tolist()
            self.trace.steps.setdefault(row, []).append((places, margin))


def unmask(logits: Tensor, is_candidate: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return proposals [B, S] and which are accepted: those strictly above the threshold, and each row's best one."""
    confidence, proposal = logits.softmax(-1).max(-1)
    confidence = confidence.masked_fill(~is_candidate, -torch.inf)
    is_accepted = confidence > threshold
    is_accepted[torch.arange(len(logits)), confidence.argmax(-1)] = True
    return proposal, is_accepted & is_candidate


def step_margin(logits: Tensor, is_candidate: Tensor, is_accepted: Tensor, threshold: float) -> float:
    """Return how near a row's step [S, V] was, in probability, to another token, place or side of the threshold."""
    best = logits.softmax(-1).topk(2).values  # [S, 2]
    confidence = best[is_candidate, 0].sort(descending=True).values
    margins = (best[is_accepted, 0] - best[is_accepted, 1]).tolist()
    if threshold < 1:
        margins += (confidence - threshold).abs().tolist()
    if len(confidence) > 1 and confidence[0] <= threshold:
        margins.append(float(confidence[0] - confidence[1]))
    return min(margins)


@torch.no_grad()
def generate(
    model: BlockDiffusionLM,
    input_ids: Tensor,
    max_new_tokens: int,
    mask_id: int = 151665,
    threshold: float = 1,
    small_block_size: int = 8,
    block_size: int = 32,
    stop_token: int = 151645,
    top_p: float = 0.95,
    temperature: float = 0,
    use_block_cache: bool = False,
    trace: Trace | None = None,
) -> Tensor:
    """Continue one prompt [1, P] (method.md 3.3); return prompt and answer [1, T], cut after the first stop token."""
    assert temperature == 0, "greedy only"
    decoder = Decoder(model, mask_id, threshold, block_size, small_block_size, use_block_cache, trace or Trace())
    tokens, length = input_ids.clone(), input_ids.shape[1]
    if length > block_size:
        following = decoder.commit(tokens[:, : length // block_size * block_size], [0], length)
        if length % block_size == 0:
            tokens = torch.cat([tokens, following[:, None]], dim=1)
    for _ in range(max_new_tokens // block_size):
        if (tokens[:, length:] == stop_token).any():
            break
        tokens = decoder.extend(tokens)
        for _ in decoder.denoising_steps(tokens, [0]):
            answer = tokens[0, length:].tolist()
            if stop_token in answer and mask_id not in answer[: answer.index(stop_token)]:
                break  # nothing before the stop token can change
        if not (tokens[:, -block_size:] == mask_id).any():
            following = decoder.commit(tokens[:, -block_size:], [0], tokens.shape[1])
            tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens[:, : length + _through_stop(tokens[0, length:], stop_token)]


@torch.no_grad()
def batch_sample(
    model: BlockDiffusionLM,
    input_ids: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_new_tokens: int,
    small_block_size: int,
    min_len: int,
    seq_len: Tensor,
    mask_id: int = 151665,
    threshold: float = 0.95,
    stop_token: int = 151645,
    use_block_cache: bool = False,
    top_p: float = 0.95,
    temperature: float = 0,
    trace: Trace | None = None,
) -> dict[int, Tensor]:
    """Continue prompts [B, longest], padded on the right with the mask token (method.md 3.5); return row -> ids."""
    assert temperature == 0, "greedy only"
    decoder = Decoder(model, mask_id, threshold, block_size, small_block_size, use_block_cache, trace or Trace())
    tokens, results = input_ids.clone(), {}
    rows, current = torch.arange(len(tokens), device=tokens.device), seq_len // block_size
    if min_len > block_size:
        following = decoder.commit(tokens[:, : min_len // block_size * block_size], rows.tolist(), min_len)
        if min_len % block_size == 0:
            tokens = _write_column(tokens, min_len, following, seq_len == min_len)
    for block in range(min_len // block_size, max_new_tokens // block_size + int(seq_len.max()) // block_size):
        end = (block + 1) * block_size
        if (current == block).all():
            tokens = decoder.extend(tokens)
        visible = tokens[:, :end].clone()
        was_masked = visible == mask_id
        for _ in decoder.denoising_steps(visible, rows.tolist()):
            pass  # finished rows decode on to the end of the block
        is_finished = (was_masked & (visible == stop_token)).any(-1)  # [B]
        for index in is_finished.nonzero().flatten().tolist():
            length = int(seq_len[rows[index]])
            visible[index, length + _through_stop(visible[index, length:], stop_token) :] = tokenizer.pad_token_id
            results[int(rows[index])] = visible[index]
        tokens[:, :end] = visible
        if not is_finished.all():
            following = decoder.commit(visible[:, -block_size:], rows.tolist(), end)
            tokens = _write_column(tokens, end, following, current == block)
        current = torch.where(current == block, block + 1, current)
        if is_finished.any():
            decoder.cache.keep_rows(~is_finished)
            tokens, rows, current = tokens[~is_finished], rows[~is_finished], current[~is_finished]
        if len(rows) == 0:
            break
    return results | {int(row): ids for row, ids in zip(rows, tokens, strict=True)}


def _through_stop(answer: Tensor, stop_token: int) -> int:
    """Return how many tokens of the answer [T] stand up to its first stop token, which counts; all if it has none."""
    stops = (answer == stop_token).nonzero().flatten().tolist()
    return stops[0] + 1 if stops else len(answer)


def _write_column(tokens: Tensor, place: int, following: Tensor, is_kept: Tensor) -> Tensor:
    """Put the next tokens [B] at `place` of the rows that keep them; a column that is not there yet takes them all."""
    if tokens.shape[1] <= place:
        return torch.cat([tokens, following[:, None]], dim=1)
    tokens[is_kept, place] = following[is_kept]
    return tokens
