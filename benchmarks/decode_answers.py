"""Whole answers of a fixed length: our engine, transformers and the published code, each behind the same `run`."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from check_published import Decoders, load_published  # beside this file
from decode_bench import BLOCK_SIZE, SUB_BLOCK_SIZE, Bench, Cell, NoTokenizer, random_prompts, spread
from replay import ReplayedThreshold
from shapes import MASK_TOKEN_ID
from torch import Tensor
from transformers import CompileConfig, StaticCache

from fastdllm.checkpoint import Adaptation, load_checkpoint, save_checkpoint
from fastdllm.decoding.engine import Request
from fastdllm.decoding.reference import decode_with_transformers

TOKENIZER_FROM = str(Path(__file__).parents[1] / "data/tiny")


class Answers(NamedTuple):
    """What one run of a batch gave and took; passes are those of one of its sequences, prefill not counted."""

    tokens: int
    seconds: float
    passes: float
    decode_seconds: float | None = None
    first_token_seconds: float | None = None
    layers_run: int | None = None
    rows_run: int | None = None


class AnswerCell:
    """One cell of answers: what runs it, and what its runs gave."""

    def __init__(self, bench: Bench, cell: Cell, prompt_tokens: int, new_tokens: int, published: str):
        self.bench, self.cell, self.results = bench, replace(cell, context=prompt_tokens), []
        self.new_tokens, self.prompts = new_tokens, random_prompts(cell.batch_size, prompt_tokens)
        is_ours = cell.kind in ("reuse", "verified") or cell.engine.startswith("fastdllm")
        self.engine = bench.engine(cell) if is_ours else None
        if cell.engine == "transformers_compiled":
            config = bench.model(cell.shape).qwen.config
            self.cache = StaticCache(config=config, max_cache_len=prompt_tokens + new_tokens)
        if cell.engine == "published":
            self.published = _published(bench, cell.shape, published)
        # plain transformers has nothing to compile: a few tokens warm it up
        warmup_tokens = 8 if cell.engine == "transformers" else new_tokens
        self.warmup_seconds, self.peak_bytes, _ = bench.peak(lambda: self._run(warmup_tokens))

    def measure(self) -> None:
        self.results.append(self._run(self.new_tokens))

    def _run(self, new_tokens: int) -> Answers:
        if self.engine is not None:
            return self._run_engine(new_tokens)
        if self.cell.engine == "published":
            return self._run_published(new_tokens)
        return self._run_transformers(new_tokens)

    def _run_engine(self, new_tokens: int) -> Answers:
        engine = self.engine
        before, before_decode = engine.seconds, engine.decode_seconds
        prompts = enumerate(self.prompts)
        done = list(engine.run(Request(prompt=one, max_new_tokens=new_tokens, seed=seed) for seed, one in prompts))
        if engine.num_slots < self.cell.batch_size:
            raise RuntimeError(f"{self.cell.name} does not fit into the memory: only {engine.num_slots} slots do.")
        return Answers(
            tokens=sum(len(answer.tokens) for answer in done),
            seconds=engine.seconds - before,
            passes=sum(answer.denoise_passes + answer.append_passes for answer in done) / len(done),
            decode_seconds=engine.decode_seconds - before_decode,
            first_token_seconds=engine.first_token_seconds,
            layers_run=sum(answer.layers_run for answer in done),
            rows_run=sum(answer.rows_run for answer in done),
        )

    def _run_transformers(self, new_tokens: int) -> Answers:
        clock, options = TokenClock(), {}
        if self.cell.engine == "transformers_compiled":
            self.cache.reset()
            options = dict(past_key_values=self.cache, compile_config=CompileConfig(dynamic=False))
        started = time.perf_counter()
        answers = decode_with_transformers(
            self.bench.model(self.cell.shape),
            self.prompts,
            max_new_tokens=new_tokens,
            stop_ids=frozenset(),
            pad_token_id=NoTokenizer.pad_token_id,
            streamer=clock,
            **options,
        )
        seconds, first = time.perf_counter() - started, clock.times[1] - started
        # the first token comes from the prefill; a pass gives one token from then on
        return Answers(sum(map(len, answers)), seconds, new_tokens - 1, seconds - first, first)

    def _run_published(self, new_tokens: int) -> Answers:
        threshold = ReplayedThreshold(self.bench.trace)
        device, length = self.bench.device, len(self.prompts[0])
        options = dict(
            max_new_tokens=new_tokens,
            mask_id=MASK_TOKEN_ID,
            threshold=threshold,
            small_block_size=SUB_BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            stop_token=-1,
            use_block_cache=True,
        )
        tokens = torch.tensor(self.prompts, device=device)
        started = time.perf_counter()
        if len(tokens) == 1:
            answers = self.published.generate(tokens, **options)
        else:
            lengths = torch.full((len(tokens),), length, device=device)
            options |= dict(tokenizer=NoTokenizer(), min_len=length, seq_len=lengths)
            answers = self.published.batch_sample(tokens, **options).values()
        count = sum(len(answer) - length for answer in answers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        # it commits every block, the last one too
        return Answers(count, time.perf_counter() - started, threshold.num_steps + new_tokens // BLOCK_SIZE)

    def row(self) -> dict[str, Any]:
        capture = getattr(self.engine, "capture_seconds", 0.0)  # not every engine captures
        count, passes = self.results[0].tokens, self.results[0].passes
        seconds = statistics.median(result.seconds for result in self.results)
        decode, first = (
            None if None in values else statistics.median(values)
            for values in zip(*((one.decode_seconds, one.first_token_seconds) for one in self.results), strict=True)
        )
        if self.cell.engine == "transformers_compiled":
            capture = max(0.0, self.warmup_seconds - seconds)
        return self.bench.row(
            self.cell,
            (seconds if decode is None else decode) / passes,
            self.cell.context + self.new_tokens / 2,
            self.peak_bytes,
            tokens_per_forward=count / self.cell.batch_size / passes,
            tokens_per_second=count / seconds,
            tokens_per_second_decode=None if decode is None else count / decode,
            first_token_seconds=first,
            tokens=count,
            passes=passes,
            layers_run=self.results[0].layers_run,
            rows_run=self.results[0].rows_run,
            repeats=len(self.results),
            spread=spread([result.seconds for result in self.results]),
            capture_seconds=capture,
            warmup_seconds=self.warmup_seconds,
        )


class TokenClock:
    """A streamer of transformers that notes when tokens come; the first call is the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _published(bench: Bench, shape: str, code: str) -> Decoders:
    """Return the published functions on the same weights, which they read from a folder."""
    model = bench.model(shape)
    with TemporaryDirectory() as folder:
        path, tokenizer = f"{folder}/export", load_checkpoint(TOKENIZER_FROM).tokenizer
        options = (model.qwen.config, tokenizer, MASK_TOKEN_ID, Adaptation(), bench.dtype)
        save_checkpoint(path, model.qwen.state_dict(), *options)
        return load_published(code, path, str(bench.device), bench.dtype)
