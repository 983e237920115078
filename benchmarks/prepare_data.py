"""How fast is text turned into packed samples, against the tokenizer alone, and in how much memory?

    python benchmarks/prepare_data.py --source FILE.jsonl.gz,... --checkpoint FOLDER

The rows of the source are drawn at random into one JSON lines file. Measured are (a) the tokenizer alone, on texts
that are already there, with all its threads; (b) prepare_documents from end to end; (c) packing documents of random
lengths, whose tokens nobody made. Every measurement runs in a process of its own.
"""

import json
import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from fastdllm.checkpoint import open_checkpoint
from fastdllm.cli import run
from fastdllm.data.documents import Documents, prepare_documents
from fastdllm.data.packing import pack
from fastdllm.data.sources import SourceConfig, parse_row, read_rows, render
from fastdllm.objective import ObjectiveConfig
from fastdllm.runtime import code_revision, device_name

TEXTS_PER_BATCH = 2000  # about what prepare_documents encodes at a time
MASK_TOKEN_ID = 151_665
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class PrepareBenchmark:
    """What is prepared, and how much of it."""

    source: str
    """JSON lines files with `messages`, separated by commas."""
    checkpoint: str
    """HF folder or hub id whose tokenizer is used."""
    megabytes: int = 100
    """Size of the JSON lines file that is tokenised, 1 or more."""
    documents: int = 2_000_000
    """Documents that are packed, 1 or more; about 500 tokens each."""
    scratch: str = ""
    """Folder for temporary files, 5 GB with the defaults; empty for the system's."""


def main(config: PrepareBenchmark) -> None:
    """Print a table of tokens, seconds, tokens per second and memory."""
    scratch = Path(tempfile.mkdtemp(prefix="prepare-", dir=config.scratch or None))
    try:
        file = scratch / "text.jsonl"
        write_rows(config.source.split(","), file, config.megabytes * 10**6)
        revision, is_dirty = code_revision()
        print(f"{device_name(torch.device('cpu'))}; revision {revision[:10]}{' and changes' if is_dirty else ''}")
        print("| what | tokens | seconds | tokens/s | tokens per CPU second | memory of all processes, MB |")
        print("|---|---|---|---|---|---|")
        _measure("tokenizer alone", partial(tokenizer_alone, config.checkpoint, str(file)))
        for num_workers in (0, 1, 2):
            action = partial(prepared, config.checkpoint, str(file), str(scratch / str(num_workers)), num_workers)
            _measure(f"prepare_documents, num_workers {num_workers}", action)
        folder = scratch / "documents"
        write_documents(folder, config.documents)
        _measure(f"pack {config.documents:,} documents", partial(packed, str(folder)))
    finally:
        shutil.rmtree(scratch)


def write_rows(sources: list[str], file: Path, num_bytes: int) -> None:
    """Write rows drawn at random from the sources, at least `num_bytes` of them."""
    rows = [line for _, line in read_rows(SourceConfig(path=",".join(sources)))]
    draw, written = random.Random(0), 0
    with file.open("wb") as stream:
        while written < num_bytes:
            written += stream.write(draw.choice(rows).strip() + b"\n")


def write_documents(folder: Path, num_documents: int) -> None:
    """Write documents of log-normal lengths whose tokens are zeros and whose second halves are responses."""
    folder.mkdir()
    lengths = np.random.default_rng(0).lognormal(5.9, 0.8, num_documents).astype(np.int64) + 2  # 500 on average
    offsets = np.concatenate([[0], lengths.cumsum()])
    offsets.tofile(folder / "offsets.int64")
    with (folder / "tokens.int32").open("wb") as stream:
        stream.truncate(4 * int(offsets[-1]))
    with (folder / "is_response.uint8").open("wb") as stream:
        for length in lengths.tolist():
            stream.write(bytes(length // 2) + b"\1" * (length - length // 2))
    (folder / "meta.json").write_text(json.dumps({"source": "synthetic"}))


# ---- measured in a process of their own; each does its preparations and returns what is timed


def tokenizer_alone(checkpoint: str, file: str) -> Callable[[], int]:
    """Encode the texts of all segments in batches."""
    tokenizer, config = open_checkpoint(checkpoint).tokenizer, SourceConfig(path=file)
    texts = [text for _, row in read_rows(config) for text, _ in render(parse_row(row, config), tokenizer)]
    encode = tokenizer.backend_tokenizer.encode_batch
    batches = [texts[first : first + TEXTS_PER_BATCH] for first in range(0, len(texts), TEXTS_PER_BATCH)]
    return lambda: sum(sum(map(len, encode(batch, add_special_tokens=False))) for batch in batches)


def prepared(checkpoint: str, file: str, cache_dir: str, num_workers: int) -> Callable[[], int]:
    """Prepare the file as training does, starting workers, hashing and writing included."""
    tokenizer, config = open_checkpoint(checkpoint).tokenizer, SourceConfig(path=file)
    return lambda: int(Documents(prepare_documents(config, tokenizer, cache_dir, num_workers)).offsets[-1])


def packed(folder: str) -> Callable[[], int]:
    """Pack the documents into samples of 2048 tokens in blocks of 32."""
    shape = {"objective": ObjectiveConfig(), "sample_length": 2048, "mask_token_id": MASK_TOKEN_ID}
    return lambda: int(pack(Documents(folder), **shape, long_documents="drop")[0].num_tokens.sum())


def _measure(name: str, prepare: Callable[[], Callable[[], int]]) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        future, peak, done = pool.submit(_timed, prepare), [0], threading.Event()
        root = next(iter(pool._processes))
        sampler = threading.Thread(target=_watch, args=(root, peak, done))
        sampler.start()
        try:
            num_tokens, seconds, cpu_seconds = future.result()
        finally:
            done.set()
            sampler.join()
    speeds = f"{num_tokens / seconds:,.0f} | {num_tokens / cpu_seconds:,.0f}"
    print(f"| {name} | {num_tokens:,} | {seconds:.1f} | {speeds} | {peak[0] / 1e6:,.0f} |", flush=True)


def _timed(prepare: Callable[[], Callable[[], int]]) -> tuple[int, float, float]:
    """Return the tokens, the seconds and the CPU seconds of this process and of its children that have ended."""
    action = prepare()
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    num_tokens = action()
    return num_tokens, time.perf_counter() - start, _cpu_seconds() - cpu_start


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _watch(root: int, peak: list[int], done: threading.Event) -> None:
    """Keep the largest memory of a process and its children, mapped files not counted."""
    while not done.wait(SAMPLE_SECONDS):
        peak[0] = max(peak[0], _memory_bytes(root))


def _memory_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    anonymous = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")), "0")
    return 1024 * int(anonymous) + sum(_memory_bytes(int(child)) for child in children)


if __name__ == "__main__":
    run(PrepareBenchmark, main)
