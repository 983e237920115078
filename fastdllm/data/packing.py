"""Documents -> samples of L tokens: whole documents, each padded to whole blocks, side by side."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastdllm.data.documents import Documents

LongDocuments = Literal["drop", "cut", "error"]
OPEN_SAMPLES = 1000  # samples that may still take a document
SORTED_WINDOW = 10_000  # documents sorted by length at a time
TOKENS_PER_SCAN = 2**22
FORMAT_VERSION = 1  # raise it when the same documents would be packed differently


@dataclass(frozen=True)
class Packing:
    """Which documents each sample holds, and what was left out."""

    documents: np.ndarray
    """[packed documents] int64 document numbers, sample by sample."""
    starts: np.ndarray
    """[samples + 1] int64; sample s holds documents[starts[s] : starts[s + 1]]."""
    num_targets: np.ndarray
    """[samples] int64 supervised targets: response tokens with a position of at least 1."""
    num_tokens: np.ndarray
    """[samples] int64 document tokens, padding not counted."""
    fill: float
    """Share of the samples' tokens that belongs to documents or their block padding."""
    num_long: int
    """Documents longer than a sample: dropped or cut."""
    num_without_targets: int
    """Documents dropped because nothing in them is supervised."""
    num_with_mask_token: int
    """Documents dropped because their text holds the mask token itself."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def first(self, num_samples: int | None) -> "Packing":
        """Return the first samples alone."""
        starts = self.starts[: None if num_samples is None else num_samples + 1]
        targets, tokens = self.num_targets[:num_samples], self.num_tokens[:num_samples]
        return replace(
            self, documents=self.documents[: starts[-1]], starts=starts, num_targets=targets, num_tokens=tokens
        )


class PackedSamples:
    """The samples of a packing; number s gives what `materialise` returns for it."""

    def __init__(
        self, documents: Documents, packing: Packing, *, sample_length: int, block_size: int, mask_token_id: int
    ):
        self.documents, self.packing = documents, packing
        self.sample_length, self.block_size, self.mask_token_id = sample_length, block_size, mask_token_id

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        first, last = self.packing.starts[number : number + 2]
        return materialise(
            self.documents,
            self.packing.documents[first:last],
            sample_length=self.sample_length,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
        )


def pack(
    documents: Documents,
    *,
    sample_length: int,
    block_size: int,
    mask_token_id: int,
    long_documents: LongDocuments,
    held_out_samples: int = 0,
) -> tuple[Packing, Packing]:
    """Return the packing of the documents and that of the last ones, held out; both are kept beside the documents.

    Held out are the last documents, enough to fill `held_out_samples` samples; no document is in both.

    Raises:
        ValueError: sample_length is not a multiple of block_size; a document is too long and long_documents is "error";
            no document is left to train on.
    """
    if sample_length % block_size or sample_length < block_size:
        raise ValueError(
            f"data.sample_length must be a multiple of objective.block_size ({block_size}), got {sample_length}; "
            f"try {max(1, sample_length // block_size) * block_size}."
        )
    key = [FORMAT_VERSION, sample_length, block_size, mask_token_id, long_documents, held_out_samples]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    files = [documents.folder / f"packing-{part}-{digest}.npz" for part in ("train", "held_out")]
    if not all(file.is_file() for file in files):
        for file, packing in zip(files, _pack(documents, *key[1:]), strict=True):
            _save(file, packing)
    return _load(files[0]), _load(files[1])


def _save(file: Path, packing: Packing) -> None:
    handle, aside = tempfile.mkstemp(dir=file.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as stream:
        np.savez(stream, **asdict(packing))
    Path(aside).chmod(0o644)
    Path(aside).rename(file)


def _load(file: Path) -> Packing:
    with np.load(file) as arrays:
        return Packing(**{name: array if array.ndim else array.item() for name, array in arrays.items()})


def _pack(
    documents: Documents, L: int, block_size: int, mask_token_id: int, long_documents: str, held_out_samples: int
) -> Iterator[Packing]:
    lengths = np.diff(documents.offsets)
    _check_lengths(lengths, L, long_documents)
    num_targets, has_mask_token = _scan(documents, L, mask_token_id)
    left_out = {
        "num_long": int((lengths > L).sum()),
        "num_without_targets": int((num_targets == 0).sum()),
        "num_with_mask_token": int(has_mask_token.sum()),
    }
    is_kept = (num_targets > 0) & ~has_mask_token & ((lengths <= L) | (long_documents == "cut"))
    kept = np.flatnonzero(is_kept)
    lengths = np.minimum(lengths, L)
    blocks = -(-lengths // block_size)
    first_held_out = _first_held_out(blocks[kept], held_out_samples * (L // block_size))
    if not first_held_out:
        raise ValueError(
            f"data: no document of {documents.meta['source']} is left to train on, of {len(documents)}: "
            f"data.sample_length {L} with data.long_documents {long_documents}, "
            f"data.validation_samples {held_out_samples}, {left_out}."
        )
    for chosen, limit in ((kept[:first_held_out], None), (kept[first_held_out:], held_out_samples)):
        samples = _best_fit(chosen, blocks, L // block_size)[:limit]
        starts = np.cumsum([0, *map(len, samples)], dtype=np.int64)
        packed = np.array([number for sample in samples for number in sample], dtype=np.int64)
        yield Packing(
            documents=packed,
            starts=starts,
            num_targets=_segment_sums(num_targets[packed], starts),
            num_tokens=_segment_sums(lengths[packed], starts),
            fill=float(blocks[packed].sum() * block_size / max(1, len(samples) * L)),
            **left_out,
        )


def _check_lengths(lengths: np.ndarray, L: int, long_documents: str) -> None:
    if long_documents == "error" and lengths.max() > L:
        raise ValueError(
            f"data.long_documents: {(lengths > L).sum()} documents are longer than data.sample_length ({L}), the "
            f"longest has {lengths.max()} tokens; raise data.sample_length, or set data.long_documents to drop or cut."
        )


def _scan(documents: Documents, L: int, mask_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return per document the supervised targets among its first L tokens, and whether it holds the mask token."""
    offsets = documents.offsets
    num_targets, has_mask_token = np.zeros(len(documents), np.int64), np.zeros(len(documents), bool)
    first = 0
    while first < len(documents):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + TOKENS_PER_SCAN, side="right")) - 1)
        starts = offsets[first:last] - offsets[first]
        lengths = np.diff(offsets[first : last + 1])
        position = np.arange(offsets[last] - offsets[first]) - np.repeat(starts, lengths)
        is_target = documents.is_response[offsets[first] : offsets[last]] & (position >= 1) & (position < L)
        is_mask_token = documents.tokens[offsets[first] : offsets[last]] == mask_token_id
        bounds = offsets[first : last + 1] - offsets[first]
        num_targets[first:last] = _segment_sums(is_target, bounds)
        has_mask_token[first:last] = _segment_sums(is_mask_token, bounds) > 0
        first = last
    return num_targets, has_mask_token


def _segment_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[starts])


def _first_held_out(blocks: np.ndarray, blocks_wanted: int) -> int:
    """Return where the shortest tail of documents with `blocks_wanted` blocks starts."""
    if not blocks_wanted:
        return len(blocks)
    from_end = np.cumsum(blocks[::-1])
    return max(0, len(blocks) - int(np.searchsorted(from_end, blocks_wanted)) - 1)


def _best_fit(chosen: np.ndarray, blocks: np.ndarray, capacity: int) -> list[list[int]]:
    """Put each document into the fullest open sample that has room for it; return the documents of each sample.

    Documents come in order, long before short ones within a window: that fills better. At most OPEN_SAMPLES stay open;
    beyond that the fullest is closed. Samples are ordered by when they were opened.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # open samples by the blocks still free
    samples, num_open = [], 0
    for number in _longest_first(chosen, blocks):
        need = int(blocks[number])
        room = next((room for room in range(need, capacity + 1) if by_room[room]), None)
        if room is not None:
            sample = by_room[room].pop()
        else:
            sample, room = [], capacity
            samples.append(sample)
            num_open += 1
            if num_open > OPEN_SAMPLES:
                next(filter(None, by_room)).pop()
                num_open -= 1
        sample.append(number)
        if room > need:
            by_room[room - need].append(sample)
        else:
            num_open -= 1
    return samples


def _longest_first(chosen: np.ndarray, blocks: np.ndarray) -> Iterator[int]:
    for first in range(0, len(chosen), SORTED_WINDOW):
        window = chosen[first : first + SORTED_WINDOW]
        yield from window[np.argsort(-blocks[window], kind="stable")].tolist()


def materialise(
    documents: Documents, numbers: np.ndarray, *, sample_length: int, block_size: int, mask_token_id: int
) -> dict[str, np.ndarray]:
    """Return one sample that holds the documents `numbers`.

    Returns:
        tokens: [L] int64, the mask token wherever no document is.
        is_response: [L] bool, false on padding.
        document: [L] int64, 1.. by document, the padding of its last block included; 0 in the rest of the sample.
        position: [L] int64, from 0 in each document and in the rest.
        num_tokens: int64 document tokens.
    """
    tokens = np.full(sample_length, mask_token_id, np.int64)
    is_response = np.zeros(sample_length, bool)
    document = np.zeros(sample_length, np.int64)
    position = np.zeros(sample_length, np.int64)
    start = num_tokens = 0
    for label, number in enumerate(numbers, start=1):
        begin = documents.offsets[number]
        length = int(min(documents.offsets[number + 1] - begin, sample_length))
        end = start - (-length // block_size) * block_size
        tokens[start : start + length] = documents.tokens[begin : begin + length]
        is_response[start : start + length] = documents.is_response[begin : begin + length]
        document[start:end] = label
        position[start:end] = np.arange(end - start)
        start, num_tokens = end, num_tokens + length
    position[start:] = np.arange(sample_length - start)
    return {
        "tokens": tokens,
        "is_response": is_response,
        "document": document,
        "position": position,
        "num_tokens": np.int64(num_tokens),
    }
