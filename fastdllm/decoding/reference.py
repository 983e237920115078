"""The plain decoders, one sequence at a time: the truth that the engine is tested against. Slow on purpose.

Source: method.md 3.1 to 3.4, without the published code's defects (3.6).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdllm.decoding.policies import accept_by_threshold, propose
from fastdllm.decoding.state import uniform_draws
from fastdllm.decoding.trace import Step, note_step
from fastdllm.masks import decode_attention_mask, draft_attention_mask
from fastdllm.model import BlockDiffusionLM


@dataclass
class Decoded:
    """What a plain decoder returns: the new tokens, and how many passes of each kind they took."""

    tokens: list[int] = field(default_factory=list)
    denoise_passes: int = 0
    append_passes: int = 0
    full_passes: int = 0
    margins: list[float] = field(default_factory=list)
    """The smallest distances of any decision to going the other way: confidence to threshold, and top-2 margins."""
    trace: list[Step] | None = None
    """What each denoising step proposed and accepted; None where that was not asked for."""


@torch.no_grad()
def decode_plain(
    model: BlockDiffusionLM,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    threshold: float,
    sub_block_size: int,
    is_traced: bool = False,
) -> Decoded:
    """Decode greedily with one pass over the whole sequence at each denoising step: no caches at all."""
    result, size = Decoded(trace=[] if is_traced else None), model.block_size
    tokens = list(prompt)
    if len(tokens) % size == 0:
        tokens.append(_next_token(model, tokens))
    while True:
        tokens += [model.mask_token_id] * (-len(tokens) % size)
        for offset in range(len(tokens) - size, len(tokens), sub_block_size):
            while model.mask_token_id in tokens[offset : offset + sub_block_size]:
                logits = _whole_logits(model, tokens)[offset - 1 : offset - 1 + sub_block_size]
                if offset == 0:  # place 0 has no row before it and is never masked
                    logits = torch.cat(
                        [logits.new_zeros(1, model.qwen.config.vocab_size), _whole_logits(model, tokens)]
                    )
                    logits = logits[:sub_block_size]
                _unmask(tokens, offset, logits, model.mask_token_id, threshold, result)
                result.denoise_passes += 1
                result.full_passes += 1
                if _is_finished(tokens, prompt, model.mask_token_id, max_new_tokens, stop_ids, result):
                    return result
        result.append_passes += 1
        tokens.append(_next_token(model, tokens))
        if _is_finished(tokens, prompt, model.mask_token_id, max_new_tokens, stop_ids, result):
            return result


@torch.no_grad()
def decode_with_stale_keys(
    model: BlockDiffusionLM,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    threshold: float,
    sub_block_size: int,
    reuse_k: int = 1,
    is_trimmed: bool = False,
    is_traced: bool = False,
) -> Decoded:
    """Decode greedily with the sub-block cache kept explicitly: the prefix is computed afresh at each pass, the block's
    own keys and values are those of the last full pass, overwritten in place by sub-block passes.

    With reuse_k above 1 a reuse step runs no layer: it takes the logits of the last full pass, which is what reuse mode
    "output" amounts to for every subset (method.md 5.3). If `is_trimmed`, sub-block passes compute active rows alone.
    """
    result, size, tokens = Decoded(trace=[] if is_traced else None), model.block_size, list(prompt)
    if len(tokens) % size == 0:
        tokens.append(_next_token(model, tokens))
    while True:
        tokens += [model.mask_token_id] * (-len(tokens) % size)
        start, step, own, stale = len(tokens) - size, 0, None, None
        known: list[int] = []  # the tokens that the block's keys and values were computed from
        for offset in range(0, size, sub_block_size):
            inside = slice(start + offset, start + offset + sub_block_size)
            while model.mask_token_id in tokens[inside]:
                if own is None or tokens[start + offset] == model.mask_token_id:
                    own, known = StaleKeys(start), list(tokens)
                    stale = shifted = _shift(_pass_logits(model, tokens, list(range(start, start + size)), own))
                    shifted = shifted[offset : offset + sub_block_size]
                    result.full_passes += 1
                elif step % reuse_k == 0:
                    rows = list(range(inside.start, inside.stop))
                    if is_trimmed:
                        after = [*tokens[: inside.stop][1:], None]
                        needed = {i for i in rows if model.mask_token_id in (tokens[i], after[i])}
                        rows = [i for i in rows if i in needed or tokens[i] != known[i]]
                    shifted = _scatter(_pass_logits(model, tokens, rows, own), rows, inside.start, sub_block_size)
                    for row in rows:
                        known[row] = tokens[row]
                else:
                    shifted = stale[offset : offset + sub_block_size]
                _unmask(tokens, start + offset, shifted, model.mask_token_id, threshold, result)
                result.denoise_passes += 1
                step += 1
                if _is_finished(tokens, prompt, model.mask_token_id, max_new_tokens, stop_ids, result):
                    return result
        result.append_passes += 1
        tokens.append(_next_token(model, tokens))
        if _is_finished(tokens, prompt, model.mask_token_id, max_new_tokens, stop_ids, result):
            return result


class StaleKeys:
    """The current block's keys and values of each layer, [1, G, D, E], of which a pass writes the places `inside`.

    Before them stands the prefix, computed in the same pass.
    """

    def __init__(self, prefix_length: int):
        self.prefix_length = prefix_length
        self.inside: list[int] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self._update(self.keys, key, layer), self._update(self.values, value, layer)

    def _update(self, kept: dict[int, Tensor], fresh: Tensor, layer: int) -> Tensor:
        prefix, own = fresh[:, :, : self.prefix_length], fresh[:, :, self.prefix_length :]
        if layer not in kept:
            kept[layer] = own.clone()
        kept[layer][:, :, self.inside] = own
        return torch.cat([prefix, kept[layer]], dim=2)


def _pass_logits(model: BlockDiffusionLM, tokens: list[int], rows: list[int], own: StaleKeys) -> Tensor:
    """Return the logits [R, V] of `rows`, places of the block, which see the prefix and the block's keys in `own`."""
    prefix, size = own.prefix_length, model.block_size
    own.inside = [row - prefix for row in rows]
    positions = torch.tensor([[*range(prefix), *rows]], device=model.device)
    keys = torch.arange(prefix + size, device=model.device)[None]
    attention_mask = decode_attention_mask(positions, keys, size, "block")
    clean = decode_attention_mask(positions, keys, size, model.context_attention)
    attention_mask[:, :, :prefix] = clean[:, :, :prefix]
    present = torch.tensor([tokens[:prefix] + [tokens[row] for row in rows]], device=model.device)
    hidden = model.hidden_states(present, positions, attention_mask, own)
    return model.logits(hidden[0, prefix:])


def _scatter(logits: Tensor, rows: list[int], first: int, count: int) -> Tensor:
    """Return the logits [count, V] for the places from `first` on: row i gives those of place i + 1, others are 0."""
    scattered = logits.new_zeros(count + 1, logits.shape[1])
    scattered[[row + 1 - first for row in rows]] = logits
    return scattered[:-1]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the token after a row is chosen; what is drawn depends on the logits, the seed and the place alone."""

    temperature: float = 0.0
    """0: the most likely token."""
    top_p: float = 1.0
    seed: int = 0

    def choose(self, logits: Tensor, number: int) -> int:
        """Return new token `number` (0 is the first after the prompt) by its logits [V]."""
        uniform = uniform_draws(torch.tensor([self.seed]), torch.tensor([number]), 1)[0].to(logits.device)
        return int(propose(logits[None], self.temperature, self.top_p, uniform)[0])


@torch.no_grad()
def decode_autoregressive(
    model: BlockDiffusionLM,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampler: Sampler | None = None,
) -> list[int]:
    """Decode token by token, greedily without a sampler, with one causal pass over the whole sequence for each."""
    tokens, sampler = list(prompt), sampler or Sampler()
    while len(tokens) < len(prompt) + max_new_tokens and (len(tokens) == len(prompt) or tokens[-1] not in stop_ids):
        tokens.append(sampler.choose(causal_logits(model, tokens)[-1], len(tokens) - len(prompt)))
    return tokens[len(prompt) :]


@torch.no_grad()
def causal_logits(model: BlockDiffusionLM, tokens: list[int]) -> Tensor:
    """Return the logits [T, V] of a token-causal pass over the whole sequence."""
    positions = torch.arange(len(tokens), device=model.device)[None]
    attention_mask = decode_attention_mask(positions, positions, model.block_size, "causal")
    return model.logits(model.hidden_states(torch.tensor([tokens], device=model.device), positions, attention_mask)[0])


@dataclass
class Verified:
    """What the plain verifying decoder returns."""

    tokens: list[int] = field(default_factory=list)
    """New tokens, those of token-by-token decoding."""
    accepted: list[int] = field(default_factory=list)
    """Drafts that each pass kept; it gave one token more."""
    drafted: list[int] = field(default_factory=list)
    """Drafts that each pass was given."""
    drafts: list[list[int]] = field(default_factory=list)
    """What each pass drafted for the next one."""
    rows: list[int] = field(default_factory=list)
    """Rows of each pass that a cache does not save: the newest token, its drafts, the drafting rows."""


@torch.no_grad()
def decode_verified(
    model: BlockDiffusionLM,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    draft_length: int,
    groups: tuple[int, ...] | None = None,
    sampler: Sampler | None = None,
) -> Verified:
    """Decode as `decode_autoregressive` does, several tokens a pass: each verifies drafts and makes the next ones.

    A pass holds the tokens so far and the drafts behind them, token by token, and for each length in `groups` a group
    of `draft_length` mask tokens which stand where the next ones would if so many drafts were accepted. A draft is
    accepted if it is what the clean row before it chooses, and so are all drafts before it; one more token is chosen
    behind them.

    Drawn at a temperature, a token is what token-by-token decoding would draw at its place, so the answer does not
    depend on the drafts. To the drafts it is rejection sampling with a certain draft: accepted with the probability of
    the draft, and else drawn from what the distribution is without it.

    Args:
        groups: accepted lengths that have a group, ascending, 0 the first; None: all up to `draft_length`. Behind
            another length the drafts are those of the next shorter one, as far as they reach.
    """
    lengths, sampler, result = groups or tuple(range(draft_length + 1)), sampler or Sampler(), Verified()
    tokens, drafts, limit = list(prompt), [], len(prompt) + max_new_tokens
    while len(tokens) < limit and (len(tokens) == len(prompt) or tokens[-1] not in stop_ids):
        newest = len(tokens) - 1
        drafts = drafts[: limit - 1 - len(tokens)]  # the pass gives a token besides
        lengths_now = sorted({min(length, len(drafts)) for length in lengths})
        clean, drafting = draft_logits(model, tokens + drafts, newest, lengths_now, draft_length)
        chosen = [sampler.choose(row, len(tokens) - len(prompt) + number) for number, row in enumerate(clean)]
        accepted = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
        result.accepted.append(accepted)
        result.drafted.append(len(drafts))
        result.rows.append(1 + len(drafts) + len(lengths_now) * draft_length)
        nearest = max(length for length in lengths_now if length <= accepted)
        drafts = drafting[lengths_now.index(nearest)].argmax(-1).tolist()[accepted - nearest :]
        result.drafts.append(drafts)
        tokens = tokens + chosen[: accepted + 1]
        result.tokens = _through_stop(tokens[len(prompt) : limit], stop_ids)
        tokens = prompt + result.tokens
    return result


def draft_logits(
    model: BlockDiffusionLM, tokens: list[int], newest: int, lengths: list[int], draft_length: int
) -> tuple[Tensor, Tensor]:
    """Return the logits of the clean rows from `newest` on, [1 + drafts, V], and of the groups, [groups, K, V]."""
    count = len(tokens)
    position, last_clean, group = list(range(count)), list(range(count)), [0] * count
    for number, length in enumerate(lengths, 1):
        position += range(newest + length + 1, newest + length + 1 + draft_length)
        last_clean += [newest + length] * draft_length
        group += [number] * draft_length
    rows = [torch.tensor([values], device=model.device) for values in (position, last_clean, group)]
    present = torch.tensor([tokens + [model.mask_token_id] * (len(position) - count)], device=model.device)
    logits = model.logits(model.hidden_states(present, rows[0], draft_attention_mask(*rows))[0])
    return logits[newest:count], logits[count:].unflatten(0, (len(lengths), draft_length))


@torch.no_grad()
def decode_with_transformers(
    model: BlockDiffusionLM,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    pad_token_id: int,
    **options: Any,
) -> list[list[int]]:
    """Decode a batch greedily with transformers' own `generate` on the same weights: the outside AR baseline.

    Args:
        stop_ids: none: every answer has `max_new_tokens` tokens.
        options: more arguments of `generate`, such as a cache.
    """
    name = model.qwen.config._attn_implementation
    width = max(len(prompt) for prompt in prompts)
    padded = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    is_token = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    model.qwen.set_attn_implementation("sdpa")
    try:
        output = model.qwen.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(is_token, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=pad_token_id,
            **options,
        )
    finally:
        model.qwen.set_attn_implementation(name)
    return [_through_stop(row, stop_ids) for row in output[:, width:].tolist()]


def _through_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    stops = [place for place, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0] + 1] if stops else tokens


def _whole_logits(model: BlockDiffusionLM, tokens: list[int]) -> Tensor:
    """Return the logits [T, V] of a pass over the whole sequence, its last whole block as a denoised block."""
    size, positions = model.block_size, torch.arange(len(tokens), device=model.device)[None]
    attention_mask = decode_attention_mask(positions, positions, size, model.context_attention)
    if len(tokens) % size == 0:
        attention_mask[:, :, -size:] = decode_attention_mask(positions[:, -size:], positions, size, "block")
    hidden = model.hidden_states(torch.tensor([tokens], device=model.device), positions, attention_mask)
    return model.logits(hidden[0])


def _next_token(model: BlockDiffusionLM, tokens: list[int]) -> int:
    """Return the greedy token after finished blocks: a clean pass, as prefill and append do."""
    positions = torch.arange(len(tokens), device=model.device)[None]
    attention_mask = decode_attention_mask(positions, positions, model.block_size, model.context_attention)
    hidden = model.hidden_states(torch.tensor([tokens], device=model.device), positions, attention_mask)
    return int(model.logits(hidden[0, -1]).argmax())


def _shift(logits: Tensor) -> Tensor:
    """Apply the token shift inside a pass: row i gives its logits to place i + 1; place 0 is never masked."""
    return torch.cat([logits[:1], logits[:-1]])


def _unmask(tokens: list[int], offset: int, logits: Tensor, mask_id: int, threshold: float, result: Decoded) -> None:
    token, confidence = propose(logits[None])
    is_candidate = torch.tensor(
        [[t == mask_id for t in tokens[offset : offset + logits.shape[0]]]], device=logits.device
    )
    is_accepted = accept_by_threshold(confidence, is_candidate, threshold)
    for place in is_accepted[0].nonzero().flatten().tolist():
        tokens[offset + place] = int(token[0, place])
    if result.trace is not None:
        result.trace.append(note_step(offset, token, confidence, is_candidate, is_accepted))
    _note_margins(logits, confidence, is_candidate, is_accepted, threshold, result)


def _note_margins(logits, confidence, is_candidate, is_accepted, threshold: float, result: Decoded) -> None:
    """Note how near any decision of this step was to going the other way."""
    candidates = confidence[is_candidate]
    margins = (candidates - threshold).abs().tolist() if threshold < 1 else []
    top = candidates.topk(min(2, len(candidates))).values
    margins += [float(top[0] - top[1])] if len(top) == 2 else []
    best_two = logits[is_accepted[0]].softmax(-1).topk(2).values  # [accepted, 2]
    margins += (best_two[:, 0] - best_two[:, 1]).tolist()
    result.margins = sorted(result.margins + margins)[:3]


def _is_finished(tokens, prompt, mask_id: int, max_new_tokens: int, stop_ids: frozenset[int], result: Decoded) -> bool:
    """Set `result.tokens` and return True at a final stop token or at the limit."""
    new = tokens[len(prompt) :]
    final = new[: new.index(mask_id)] if mask_id in new else new
    result.tokens = _through_stop(final[:max_new_tokens], stop_ids)
    return len(result.tokens) == max_new_tokens or (bool(result.tokens) and result.tokens[-1] in stop_ids)
