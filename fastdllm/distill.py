"""Training data from the model's own answers: `python -m fastdllm.distill --help` documents every option.

Adapting to what a model would have said anyway changes its behaviour least. Prompts are rows as in training
(`data.path` and the columns); what stands after the last user turn is not shown to the model. Answers come from the
engine in mode ar, so each request's draws depend on its own seed alone, whatever the batch around it.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from fastdllm.checkpoint import Checkpoint, load_checkpoint
from fastdllm.cli import run
from fastdllm.data.sources import MalformedRow, SourceConfig, check_source, parse_prompt, read_rows
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine
from fastdllm.decoding.rows import Request
from fastdllm.evaluation.store import Key, SampleStore, digest
from fastdllm.runtime import code_revision, get_optimal_dtype, pick_device, write_bytes

Turns = list[dict[str, str]]
JUDGED_ALONE = 2_000  # answers; above, starting processes takes less time than judging them one after the other


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Let a model answer prompts, and write what it said as training data."""

    checkpoint: str
    """Hub id, HF folder or .gguf file of the model that answers, token by token."""
    output: str
    """File to write, .jsonl or .jsonl.gz; what is done stands in OUTPUT.partial until all is."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """The prompts. A row with an assistant turn is answered from the turn before its last one."""
    answer_column: str = "answer"
    """Column with the right answer, for `keep right`."""
    samples: int = 1
    """Answers to each prompt, 1 or more."""
    keep: Literal["finished", "right"] = "finished"
    """finished: what ended by itself within max_new_tokens; right: of that, what math_verify finds equal to the row's
    answer (rows without one are left out). An answer that a prompt gets twice is kept once."""
    temperature: float = 0.7
    """0: greedy, for samples 1."""
    top_p: float = 0.95
    """Nucleus for temperature above 0."""
    max_new_tokens: int = 512
    """Limit on each answer."""
    batch_size: int = 256
    """Answers decoded together."""
    seed: int = 0
    """Of all draws."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not self.output.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"output must end in .jsonl or .jsonl.gz, got {self.output!r}.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples {self.samples} at temperature 0 would all be the same; take 1, or a temperature such as 0.7."
            )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is to be answered: turns up to the last user's, and the row's own facts."""

    place: str
    turns: Turns
    source: str
    answer: str | None


def distill(config: DistillConfig) -> None:
    """Write the answers, one training row each; go on where an earlier call with the same config stopped.

    Raises:
        ValueError, FileNotFoundError: what cannot be read, answered or judged, with the way out.
    """
    check_source(config.data, needs_response=False)
    prompts, num_malformed = read_prompts(config)
    if config.keep == "right":
        prompts = [prompt for prompt in prompts if prompt.answer is not None]
        if not prompts:
            raise ValueError(
                f"keep right needs rows with a right answer in column {config.answer_column!r}, and {config.data.path} "
                "has none; name the column with --answer_column, or take --keep finished."
            )
    device = pick_device(config.device)
    checkpoint = load_checkpoint(config.checkpoint, dtype=get_optimal_dtype(device)[0], device=str(device))
    provenance = {
        "model": checkpoint.portable_source,
        "checkpoint_hash": checkpoint.digest,
        "revision": code_revision()[0],
        **{name: getattr(config, name) for name in ("temperature", "top_p", "seed", "max_new_tokens")},
    }
    tally = Counter(malformed=num_malformed)
    identity = {name: value for name, value in asdict(config).items() if name not in ("batch_size", "device")}
    store = SampleStore(f"{config.output}.partial", identity | provenance)
    keys = answer_all(config, checkpoint, prompts, store)
    rows = list(training_rows(config, prompts, keys, store, provenance, tally))
    write_rows(Path(config.output), rows)
    store.remove()
    parts = ", ".join(f"{number:,} {what}" for what, number in tally.items())
    print(f"{config.output}: {len(rows):,} answers to {len(prompts):,} prompts; {parts}")


def read_prompts(config: DistillConfig) -> tuple[list[Prompt], int]:
    """Return the prompts, and how many rows hold none."""
    prompts, num_malformed = [], 0
    for place, row in read_rows(config.data):
        try:
            turns, row = parse_prompt(row, config.data)
        except MalformedRow as problem:
            if config.data.strict:
                raise ValueError(f"{place}: {problem}.") from problem
            num_malformed += 1
            continue
        answer = row.get(config.answer_column)
        answer = None if answer is None else str(answer)
        prompts.append(Prompt(place=place, turns=turns, source=str(row.get("source", "")), answer=answer))
    if not prompts:
        raise ValueError(f"data.path: no row of {config.data.path} holds a prompt ({num_malformed} rows read).")
    return prompts, num_malformed


def answer_all(config: DistillConfig, checkpoint: Checkpoint, prompts: list[Prompt], store: SampleStore) -> list[Key]:
    """Put every answer that is not there yet into the store, as [text, whether it ended by itself].

    Returns:
        The keys of all answers, by prompt and sample; the store may hold others, to prompts that were changed since.
    """
    tokenizer = checkpoint.tokenizer
    keys: list[Key] = []
    missing: list[Key] = []
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        text = tokenizer.apply_chat_template(prompt.turns, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        for sample in range(config.samples):
            key = (prompt.place, number, sample, digest(tokens))
            keys.append(key)
            if key not in store.samples:
                missing.append(key)
                seed = (config.seed * len(prompts) + number) * config.samples + sample
                requests.append(Request(prompt=tokens, max_new_tokens=config.max_new_tokens, seed=seed))
    engine = Engine(
        checkpoint.model(),
        tokenizer,
        mode="ar",
        decode=DecodeConfig(temperature=config.temperature, top_p=config.top_p),
        batch_size=config.batch_size,
    )
    seconds, num_kept = 0.0, len(keys) - len(missing)
    for completion in tqdm(engine.run(requests), desc="answers", total=len(keys), initial=num_kept):
        is_finished = completion.tokens[-1] in engine.stop_ids
        store.add(missing[completion.index], [completion.text, is_finished], engine.seconds - seconds)
        seconds = engine.seconds
    engine.free()
    return keys


def training_rows(
    config: DistillConfig,
    prompts: list[Prompt],
    keys: list[Key],
    store: SampleStore,
    provenance: dict[str, Any],
    tally: Counter,
) -> Iterator[dict[str, Any]]:
    """Yield a training row for each answer that is kept, by prompt and sample; count the others in `tally`."""
    seen: set[tuple[int, str]] = set()
    finished = {(key[1], text): None for key in keys for text, is_finished in [store.samples[key]] if is_finished}
    is_right = dict.fromkeys(finished, True)
    if config.keep == "right":
        verdicts = judge([(prompts[number].answer, text) for number, text in finished])
        is_right = dict(zip(finished, verdicts, strict=True))
    for key in keys:
        (_, number, sample, _), (text, is_finished) = key, store.samples[key]
        prompt = prompts[number]
        if not is_finished:
            tally["cut off"] += 1
        elif not is_right[number, text]:
            tally["wrong"] += 1
        elif (number, text) in seen:
            tally["repeated"] += 1
        else:
            seen.add((number, text))
            row = {"messages": [*prompt.turns, {"role": "assistant", "content": text}], "source": prompt.source}
            row |= {} if prompt.answer is None else {"answer": prompt.answer}
            yield row | {"provenance": provenance | {"prompt": prompt.place, "sample": sample}}


def judge(pairs: list[tuple[str | None, str]]) -> list[bool]:
    """Return whether each (right answer, text) goes together; for many of them in several processes."""
    if len(pairs) <= JUDGED_ALONE:
        return [is_equal(answer, text) for answer, text in pairs]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(is_equal, *zip(*pairs, strict=True), chunksize=64))


def is_equal(answer: str | None, text: str) -> bool:
    """Whether math_verify finds the answer, which may be a number or LaTeX, at the end of the text."""
    import math_verify  # comes with fastdllm[eval]

    given = math_verify.parse(f"${answer}$")
    return bool(given) and math_verify.verify(given, math_verify.parse(text))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines, compressed if the name ends in .gz, under the name only when complete."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def main(arguments: list[str] | None = None) -> None:
    run(DistillConfig, distill, arguments)


if __name__ == "__main__":
    main()
