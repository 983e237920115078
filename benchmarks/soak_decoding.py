"""Does any of thousands of requests get lost, doubled or changed by the company it is decoded in?

    python benchmarks/soak_decoding.py [--requests 10000]

A small random model in float32 on the CPU. Requests have random prompts, limits, thresholds and stop strings; they go
through engines of random batch sizes and settings, in which memory runs out at random passes, so that requests are
thrown out and begun again. Every answer is compared with the plain decoder's, which knows no batch and no cache. An
answer may differ only where a decision of the plain decoder was a tie (two numbers less than 1e-5 apart); those are
listed. Exits 1 if a request is lost, doubled or different, or if ties are more than 1 in 1,000.
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from fastdllm.cli import run
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.forward import PlainForward
from fastdllm.decoding.reference import Decoded, decode_plain, decode_with_stale_keys
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import code_revision, device_name, write_text

TIE = 1e-5
MOST_TIES = 1e-3
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Decode many requests under stress and compare each with the plain decoder."""

    requests: int = 10_000
    """How many."""
    per_engine: int = 250
    """Requests that one engine gets."""
    failures: int = 2
    """Times that memory runs out in an engine."""
    seed: int = 0
    """Of the model, the requests and the failures."""
    output: str = ""
    """File for the result as JSON; none if empty."""


class FailingForward(PlainForward):
    """Runs out of memory at the passes whose numbers are in `failing`."""

    failing: set[int] = set()
    passes = failures = 0

    def __call__(self, tokens, *arguments, **options):
        FailingForward.passes += 1
        if FailingForward.passes in FailingForward.failing and len(tokens) > 1:  # one row alone cannot be halved
            FailingForward.failures += 1
            raise torch.OutOfMemoryError("simulated")
        return super().__call__(tokens, *arguments, **options)


class SoakEngine(Engine):
    forward_class = FailingForward
    lag = 0  # rounds by which the host follows late, as it does on a GPU

    def _set_up(self, waiting) -> None:
        super()._set_up(waiting)
        self._lag = self.lag if self._is_universal else 0


@dataclass
class Tally:
    requests: int = 0
    tokens: int = 0
    failures: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    ties: list[dict] = field(default_factory=list)


def soak(config: SoakConfig) -> Tally:
    """Run all requests, print what differs and a summary."""
    started, chance = time.perf_counter(), random.Random(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    tally = Tally()
    while tally.requests < config.requests:
        model = make_model(len(tokenizer) + 1, chance)
        count = min(config.per_engine, config.requests - tally.requests)
        prefix = chance.choices(range(len(tokenizer)), k=chance.choice([0, 0, 20, 40]))
        requests = [make_request(chance, len(tokenizer), prefix) for _ in range(count)]
        check(model, tokenizer, requests, config, chance, tally)
        print(f"{tally.requests} requests, memory ran out {tally.failures} times, {len(tally.ties)} ties", flush=True)
    result = asdict(tally) | {"seconds": time.perf_counter() - started, "device": device_name(torch.device("cpu"))}
    result |= {
        "revision": code_revision()[0],
        "is_dirty": code_revision()[1],
        "config": asdict(config) | {"output": Path(config.output).name},
    }
    print(json.dumps(result))
    if config.output:
        write_text(Path(config.output), json.dumps(result, indent=1) + "\n")
    if tally.lost or tally.doubled or tally.different or len(tally.ties) > MOST_TIES * tally.requests:
        sys.exit(1)
    return tally


def make_model(vocabulary: int, chance: random.Random) -> BlockDiffusionLM:
    """Return a random model with peaked, varied predictions, so that thresholds and stops matter."""
    torch.manual_seed(chance.randrange(2**31))
    shape = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.35,
        tie_word_embeddings=True,
    )
    qwen = Qwen2ForCausalLM(shape).eval()
    context = chance.choice(["block", "causal"])
    return BlockDiffusionLM(qwen, block_size=16, mask_token_id=vocabulary - 1, context_attention=context)


def make_request(chance: random.Random, vocabulary: int, prefix: list[int]) -> Request:
    length = chance.choice([1, chance.randrange(1, 16), 16, 32, chance.randrange(1, 90)])
    return Request(
        prompt=prefix + chance.choices(range(vocabulary), k=length),
        max_new_tokens=chance.choice([1, 5, 16, 33, 70]),
        stop_strings=tuple(chance.choices("abcdefghij .,0123456789", k=chance.choice([0, 0, 1, 3]))),
        parameter=chance.choice([0.05, 0.2, 0.5, 0.9, 1.0]),
    )


def check(model, tokenizer, requests: list[Request], config: SoakConfig, chance: random.Random, tally: Tally) -> None:
    """Decode the requests with one engine and compare each answer with the plain decoder's."""
    decode = DecodeConfig(
        sub_block_size=chance.choice([4, 8, 16]),
        use_block_cache=chance.random() < 0.7,
        fuse_append=chance.random() < 0.3,
    )
    batch_size = chance.choice([1, 3, 8, 32, 64])
    engine = SoakEngine(model, tokenizer, decode=decode, batch_size=batch_size, free_rows=chance.choice([0, 10**6]))
    engine.lag = chance.choice([0, 1])
    FailingForward.passes = FailingForward.failures = 0
    failures = config.failures if batch_size > 4 else 0  # each halves the batch size
    FailingForward.failing = {chance.randrange(1, 300) for _ in range(failures)}
    completions = list(engine.run(requests))
    tally.failures += FailingForward.failures
    seen = [completion.index for completion in completions]
    tally.doubled += len(seen) - len(set(seen))
    tally.lost += len(requests) - len(set(seen))
    for completion in completions:
        request = requests[completion.index]
        plain = answer_plainly(model, request, decode, engine.stop_ids)
        tally.requests += 1
        tally.tokens += completion.counted_tokens
        if completion.text != cut(tokenizer, plain.tokens, engine.stop_ids, request.stop_strings):
            if plain.margins and plain.margins[0] < TIE:
                tally.ties.append({"request": asdict(request), "margin": plain.margins[0]})
            else:
                tally.different += 1
                print(f"differs, margin {plain.margins[:1]}: {request}, {decode}", flush=True)


def answer_plainly(model: BlockDiffusionLM, request: Request, decode: DecodeConfig, stop_ids) -> Decoded:
    plain = decode_with_stale_keys if decode.use_block_cache else decode_plain
    return plain(
        model,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        stop_ids=stop_ids,
        threshold=request.parameter,
        sub_block_size=decode.sub_block_size,
    )


def cut(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop_ids, stop_strings: tuple[str, ...]) -> str:
    """Return the text of an answer without its stop token, before its first stop string."""
    kept = tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens
    text = tokenizer.decode(kept, skip_special_tokens=False)
    for stop in stop_strings:
        text = text.split(stop, 1)[0]
    return text


if __name__ == "__main__":
    run(SoakConfig, soak)
