"""How fast does a gated adapter draft for its model, and is what comes out the model's own text?

    python benchmarks/lossless.py --checkpoint FOLDER --adapter FOLDER --prompts FILE.jsonl

The same prompts are answered greedily by transformers' own `generate` (the first ones, one at a time, and a batch), by
our mode ar, both on the weights without the adapter, and by policy verified at each draft length; 0 is chosen while
decoding. What of transformers is compared and not timed may come from batches (`exact_batch_size`): one at a time it
takes minutes, and several processes on one GPU take turns. Prompts are lines with "question" (GSM8K), "entry_point"
(HumanEval) or "prompt", asked as evaluation asks.

Each answer is compared, token by token, with that of transformers. The first difference of each is listed with the
margin of the reference there: by how much the best of its logits leads the second, in plain layers without a cache.
Rows are written, one for each policy, draft length and batch size, and one for what was accepted at each draft length
(`accepted_counts` is a trace that decode_speed.py replays).
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lossless_report import acceptance_table, speed_table  # beside this file
from prompts import read_requests
from transformers import PreTrainedTokenizerBase

from fastdllm.checkpoint import load_checkpoint
from fastdllm.cli import run
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine, Request
from fastdllm.decoding.policies import VERIFIED
from fastdllm.decoding.reference import causal_logits, decode_with_transformers
from fastdllm.decoding.rows import Completion, stop_token_ids
from fastdllm.decoding.state import Phase
from fastdllm.decoding.verify import VerifySteps
from fastdllm.evaluation.results import markdown
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import (
    code_revision,
    device_name,
    get_optimal_dtype,
    library_versions,
    pick_device,
    write_text,
)

WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class LosslessConfig:
    """Measure policy verified with a gated adapter, and compare its answers with the model's own."""

    checkpoint: str
    """The model that is drafted for."""
    adapter: str
    """Folder of its gated adapter."""
    prompts: str
    """JSON lines, gzip or not."""
    count: int = 100
    """Prompts taken, from the first."""
    exact_count: int = 20
    """Of these, how many transformers answers: ours are compared with them."""
    timed_count: int = 20
    """Of those, how many its speed at batch size 1 is taken from."""
    exact_batch_size: int = 1
    """Prompts that transformers answers together, of those that it is not timed on."""
    max_new_tokens: int = 256
    """Limit on each answer."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Prompts decoded together."""
    draft_lengths: list[int] = field(default_factory=lambda: [4, 7, 8, 15, 16, 0])
    """Drafts of a pass; 0: chosen while decoding."""
    repeats: int = 1
    """Rounds in which speeds of our engine are measured; the median counts."""
    dtype: str = "auto"
    """Of weights and passes; auto: the device's best."""
    label: str = ""
    """Begins the rows' names; empty: the names of adapter folder and prompts file."""
    output: str = "experiments/04_lossless/rows"
    """Folder of the rows."""

    def __post_init__(self):
        for name in ("count", "exact_count", "timed_count", "exact_batch_size", "max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if min(self.batch_sizes, default=0) < 1 or not self.draft_lengths:
            raise ValueError(f"batch_sizes must be numbers above 0, and draft_lengths not empty, got {self}.")


class NotedSteps(VerifySteps):
    """Verifying passes that note, on the device, what is accepted of the drafts that they are given."""

    def __init__(self, *arguments, max_drafts: int, **options):
        super().__init__(*arguments, max_drafts=max_drafts, **options)
        kinds = ("reached", "kept", "counts")
        self.notes = {kind: torch.zeros(max_drafts + 1, dtype=torch.int64, device=self.model.device) for kind in kinds}

    def _num_accepted(self, at, is_right, num_drafts):
        accepted, place = super()._num_accepted(at, is_right, num_drafts), self._range(len(self.notes["kept"]))
        is_served = (at.phase == Phase.VERIFY)[:, None]
        is_full = is_served & (num_drafts == is_right.shape[1])[:, None]
        self.notes["reached"] += (is_served & (place < num_drafts[:, None]) & (place <= accepted[:, None])).sum(0)
        self.notes["kept"] += (is_served & (place < accepted[:, None])).sum(0)
        self.notes["counts"] += (is_full & (place == accepted[:, None])).sum(0)
        return accepted


class Lossless:
    """Owns the models, the requests and the reference answers."""

    def __init__(self, config: LosslessConfig):
        self.config, self.device = config, pick_device()
        dtype = get_optimal_dtype(self.device)[0] if config.dtype == "auto" else getattr(torch, config.dtype)
        base, adapted = (
            load_checkpoint(config.checkpoint, dtype=dtype, device=str(self.device), adapter=adapter)
            for adapter in ("", config.adapter)
        )
        self.base, self.adapted, self.tokenizer = base.model(), adapted.model(), base.tokenizer
        self.requests = read_requests(config.prompts, config.count, config.max_new_tokens, self.tokenizer)
        commit, is_dirty = code_revision()
        self.facts = {"device": device_name(self.device), "dtype": str(dtype).removeprefix("torch.")}
        self.facts |= {"revision": commit, "is_dirty": is_dirty, "versions": library_versions()}
        self.facts |= {"checkpoint_hash": adapted.digest, "config": asdict(config)}
        self._margins: dict[tuple[int, int], float] = {}

    def engine(self, draft_length: int | None, batch_size: int) -> Engine:
        """Return an engine: mode ar without the adapter for None, else policy verified with it."""
        if draft_length is None:
            return Engine(self.base, self.tokenizer, mode="ar", batch_size=batch_size)
        decode = DecodeConfig(policy=VERIFIED, draft_length=draft_length)
        return Engine(self.adapted, self.tokenizer, decode=decode, batch_size=batch_size)

    @cached_property
    def timed(self) -> tuple[list[list[int]], float]:
        """What transformers answers to the first prompts, one at a time, and the seconds that they took."""
        timed = self.requests[: min(self.config.timed_count, self.config.exact_count)]
        return answer_with_transformers(self.base, self.tokenizer, timed, 1)

    @cached_property
    def reference(self) -> list[list[int]]:
        """What transformers answers to the first prompts."""
        timed, _ = self.timed
        others = self.requests[len(timed) : self.config.exact_count]
        return timed + answer_with_transformers(self.base, self.tokenizer, others, self.config.exact_batch_size)[0]

    def transformers_row(self, batch_size: int) -> dict[str, Any]:
        """Return the row of transformers: the reference's at batch size 1, else that of one batch."""
        one_batch = partial(answer_with_transformers, self.base, self.tokenizer, self.requests[:batch_size], batch_size)
        found, seconds = self.timed if batch_size == 1 else one_batch()
        tokens = sum(map(len, found))
        return self._row("transformers", None, batch_size, tokens_per_forward=1.0, tokens_per_second=tokens / seconds)

    def engine_row(self, draft_length: int | None, batch_size: int) -> dict[str, Any]:
        """Return the row of our engine."""
        engine, seconds, decode_seconds = self.engine(draft_length, batch_size), [], []
        list(engine.run([replace(one, max_new_tokens=WARM_UP_TOKENS) for one in self.requests[:batch_size]]))
        for _ in range(self.config.repeats):
            before = engine.seconds, engine.decode_seconds
            done = sorted(engine.run(self.requests), key=lambda completion: completion.index)
            seconds.append(engine.seconds - before[0])
            decode_seconds.append(engine.decode_seconds - before[1])
        tokens, passes = sum(len(one.tokens) for one in done), sum(one.denoise_passes for one in done)
        row = self._row(
            "ar" if draft_length is None else VERIFIED,
            draft_length,
            batch_size,
            tokens_per_forward=tokens / passes,
            tokens_per_second=tokens / statistics.median(seconds),
            tokens_per_second_decode=tokens / statistics.median(decode_seconds),
            rows_per_token=self._decoded_rows(done, engine) / tokens,
            accepted_share=_share(sum(one.accepted_drafts for one in done), sum(one.checked_drafts for one in done)),
            capture_seconds=engine.capture_seconds,
            **self.compare([one.tokens for one in done]),
        )
        engine.free()
        return row

    def _decoded_rows(self, done: Sequence[Completion], engine: Engine) -> int:
        """Return the rows that were computed, those of prompts left out."""
        shared = engine._prefix_length  # read once, for all
        read = sum(max(0, len(request.prompt) - 1 - shared) for request in self.requests)
        return sum(one.rows_run for one in done) // self.base.num_layers - read

    def acceptance_row(self, draft_length: int) -> dict[str, Any]:
        """Return what is accepted at a draft length, place by place; it does not depend on the batch."""
        engine = self.engine(draft_length, max(self.config.batch_sizes))
        engine.steps_class = NotedSteps
        done = list(engine.run(self.requests))
        notes = {kind: numbers.tolist() for kind, numbers in engine.steps.notes.items()}
        engine.free()
        tokens, passes = sum(len(one.tokens) for one in done), sum(one.denoise_passes for one in done)
        shares = [_share(kept, reached) for kept, reached in zip(notes["kept"], notes["reached"], strict=True)]
        row = self._row("acceptance", draft_length, None, tokens_per_forward=tokens / passes)
        return row | {"accepted_by_place": shares[:-1], "accepted_counts": notes["counts"], "passes": passes}

    def compare(self, found: Sequence[list[int]]) -> dict[str, Any]:
        """Return how many answers equal the reference, and where each other one differs first."""
        differences = []
        for number, (ours, theirs) in enumerate(zip(found, self.reference, strict=False)):
            if ours != theirs:
                pairs = list(zip(ours, theirs, strict=False))
                place = next((i for i, (own, other) in enumerate(pairs) if own != other), len(pairs))
                tokens = [answer[place] if place < len(answer) else None for answer in (ours, theirs)]
                margin = self.margin(number, place)
                differences.append({"prompt": number, "place": place, "tokens": tokens, "margin": margin})
        compared = min(len(found), len(self.reference))
        return {"compared": compared, "equal": compared - len(differences), "differences": differences}

    def margin(self, number: int, place: int) -> float:
        """Return by how much the reference's best logit leads the second at a place of its answer."""
        if (number, place) not in self._margins:
            known = self.requests[number].prompt + self.reference[number][:place]
            best, second = causal_logits(self.base, known)[-1].topk(2).values.tolist()
            self._margins[number, place] = best - second
        return self._margins[number, place]

    def _row(self, policy: str, draft_length: int | None, batch_size: int | None, **values: Any) -> dict[str, Any]:
        asked = {"policy": policy, "draft_length": draft_length, "batch_size": batch_size}
        return asked | values | self.facts


def answer_with_transformers(
    model: BlockDiffusionLM, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], batch_size: int
) -> tuple[list[list[int]], float]:
    """Return transformers' greedy answers and the seconds that they took; a few tokens warm it up."""
    done, seconds = [], 0.0
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        for most in (WARM_UP_TOKENS,) * (start == 0) + (batch[0].max_new_tokens,):
            started = time.perf_counter()
            found = decode_with_transformers(
                model,
                [request.prompt for request in batch],
                max_new_tokens=most,
                stop_ids=stop_token_ids(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
        seconds += time.perf_counter() - started
        done += found
    return done, seconds


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def measure(config: LosslessConfig) -> list[dict[str, Any]]:
    """Measure everything, write the rows, print them as a table, and return them."""
    bench, rows = Lossless(config), []
    for batch_size in sorted(config.batch_sizes, key=lambda size: size != 1):
        outside, own_ar = bench.transformers_row(batch_size), bench.engine_row(None, batch_size)
        verified = (bench.engine_row(length, batch_size) for length in config.draft_lengths)
        for row in chain((outside, own_ar), verified):
            row |= speed_ups(row, own_ar, outside)
            _write(config, row)
            print(f"{name_of(row)}: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
            rows.append(row)
    accepted = [bench.acceptance_row(length) for length in config.draft_lengths if length]
    for row in accepted:
        _write(config, row)
    print_differences(rows)
    print("\n" + markdown(speed_table(rows)) + "\n\n" + markdown(acceptance_table(accepted)))
    return rows + accepted


def speed_ups(row: dict[str, Any], own_ar: dict[str, Any], outside: dict[str, Any]) -> dict[str, float]:
    """Return how often a row's speed is that of our mode ar and of transformers, at its batch size."""
    return {
        f"speedup_over_{name}": row["tokens_per_second"] / other["tokens_per_second"]
        for name, other in (("own_ar", own_ar), ("transformers", outside))
    }


def name_of(row: dict[str, Any]) -> str:
    length = row["draft_length"]
    parts = [row["policy"], None if length is None else f"d{length or 'chosen'}"]
    return "-".join(part for part in (*parts, row["batch_size"] and f"b{row['batch_size']}") if part)


def _write(config: LosslessConfig, row: dict[str, Any]) -> None:
    adapter = Path(config.adapter)
    names = (adapter.parent.name if adapter.name == "export" else adapter.name, Path(config.prompts).name.split(".")[0])
    label = config.label or "-".join(names)
    write_text(Path(config.output) / f"{label}-{name_of(row)}.json", json.dumps(row, indent=1) + "\n")


def print_differences(rows: Sequence[dict[str, Any]]) -> None:
    """Print where each answer first differs from transformers', with the margin there."""
    for row in rows:
        for one in row.get("differences", []):
            print(f"{name_of(row)}: prompt {one['prompt']} differs at token {one['place']}, margin {one['margin']:.4f}")


if __name__ == "__main__":
    run(LosslessConfig, measure)
