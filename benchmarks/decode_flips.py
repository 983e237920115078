"""How often do the fused passes decide otherwise than the plain layers, and how near a tie were those decisions?

    python benchmarks/decode_flips.py --checkpoint FOLDER --prompts FILE.jsonl [--dtype bfloat16]

Answers are decoded by the plain layers. Beside each pass the fused one runs on the same tokens, with keys and values of
its own, so that differences may build up as they would in use; what it would have proposed for each masked place, and
whether it would have accepted that, is compared. Flips are listed by the plain layers' own margin: the probability of
the most likely token minus that of the second, or the confidence minus the threshold. Then the same prompts are decoded
by an engine of plain layers and by one as it comes (fused, with CUDA graphs on a GPU), and the answers are compared.
The prompts are those of a JSON-lines file, as prompts.py reads it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from prompts import read_requests  # beside this file
from torch import Tensor

from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import run
from fastdllm.decoding.cache import SlotCache
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine, Request
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.fused import FusedForward
from fastdllm.decoding.policies import accept_by_threshold
from fastdllm.decoding.steps import Steps
from fastdllm.runtime import code_revision, device_name, pick_device, write_text

WORST = 10  # margins listed, from the largest


@dataclass(frozen=True, kw_only=True)
class FlipsConfig:
    """Compare the decisions of fused and plain passes."""

    checkpoint: str
    """An adapted checkpoint."""
    prompts: str
    """JSON lines, gzip or not."""
    count: int = 64
    """Prompts taken, from the first."""
    max_new_tokens: int = 256
    """Limit on each answer."""
    batch_size: int = 8
    """Prompts decoded together."""
    threshold: float = 0.9
    """Confidence above which a proposal is accepted."""
    dtype: str = "bfloat16"
    """Of weights and passes."""
    output: str = ""
    """File for the result as JSON; none if empty."""


class BothForward(PlainForward):
    """The plain pass, and the fused one beside it: hidden states are [B, T, 2C], the plain ones first."""

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.fused, self.fused_cache = FusedForward(model), SlotCache(model, cache.keys.shape[1], cache.capacity)

    def __call__(self, tokens, rows, reuse=None, *, is_clean=False):
        return torch.cat([super().__call__(tokens, rows), self.fused(tokens, rows, self.fused_cache)], dim=-1)

    def propose(self, hidden, *options):
        plain, fused = hidden.chunk(2, dim=-1)
        best, best_logit, log_sum, *_ = self.fused.statistics(fused.flatten(0, 1))
        self.fused_token, confidence = best.view(hidden.shape[:-1]), (best_logit - log_sum).exp()
        self.fused_confidence = confidence.view(hidden.shape[:-1])
        top = self.model.logits(plain).softmax(-1).topk(2).values
        self.margin = top[..., 0] - top[..., 1]
        return super().propose(plain, *options)


class ComparingSteps(Steps):
    """Steps that compare each proposal for a masked place with the fused one; `margins` are those of the flips."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.num_candidates, self.token_margins, self.accept_margins = 0, [], []

    def _unmask(self, slots, at, block, is_denoised, proposals):
        present, other = block.gather(1, self._inside(at)), self.forward
        is_candidate = (present == self.model.mask_token_id) & is_denoised[:, None]
        threshold = self._parameter(slots, at)[:, None]
        ours, theirs = (
            accept_by_threshold(confidence, is_candidate, threshold)
            for confidence in (proposals.confidence, other.fused_confidence)
        )
        is_flipped = is_candidate & (proposals.token != other.fused_token)
        is_accept_flipped = is_candidate & (ours != theirs)
        self.num_candidates += int(is_candidate.sum())
        self.token_margins += other.margin[is_flipped].tolist()
        self.accept_margins += (proposals.confidence - threshold).abs()[is_accept_flipped].tolist()
        return super()._unmask(slots, at, block, is_denoised, proposals)


def measure(config: FlipsConfig) -> None:
    """Print what differs, and write it."""
    device = pick_device()
    checkpoint = load_checkpoint(config.checkpoint, dtype=getattr(torch, config.dtype), device=str(device))
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer
    requests = read_requests(config.prompts, config.count, config.max_new_tokens, tokenizer)
    options = dict(decode=DecodeConfig(threshold=config.threshold), batch_size=config.batch_size)
    steps: list[ComparingSteps] = []

    def make_steps(*arguments, **settings) -> ComparingSteps:
        steps.append(ComparingSteps(*arguments, **settings))
        return steps[-1]

    comparing = Engine(model, tokenizer, is_graphed=False, is_fused=False, **options)
    comparing.forward_class, comparing.steps_class = BothForward, make_steps
    plain = answers(comparing, requests)
    ours = answers(Engine(model, tokenizer, **options), requests)
    result = {
        "candidates": sum(one.num_candidates for one in steps),
        "token_flips": margins([margin for one in steps for margin in one.token_margins]),
        "accept_flips": margins([margin for one in steps for margin in one.accept_margins]),
        "answers": len(plain),
        "equal_answers": sum(a == b for a, b in zip(plain, ours, strict=True)),
    }
    commit, is_dirty = code_revision()
    result |= {
        "device": device_name(device),
        "revision": commit,
        "is_dirty": is_dirty,
        "config": asdict(config) | {"output": Path(config.output).name},
    }
    print(json.dumps(result, indent=1))
    if config.output:
        write_text(Path(config.output), json.dumps(result, indent=1) + "\n")


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [done.tokens for done in sorted(engine.run(requests), key=lambda completion: completion.index)]


def margins(values: list[float]) -> dict:
    """Return how many there are, their median, and the largest."""
    ordered = sorted(values, reverse=True)
    return {
        "count": len(ordered),
        "median": float(Tensor(ordered).median()) if ordered else None,
        "worst": ordered[:WORST],
    }


if __name__ == "__main__":
    run(FlipsConfig, measure)
