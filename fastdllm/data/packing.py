"""Documents -> samples of a fixed number of rows: whole documents, each padded to whole blocks, side by side."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fastdllm.data.documents import Documents
from fastdllm.draft import DraftConfig
from fastdllm.objective import ObjectiveConfig

Objective = ObjectiveConfig | DraftConfig
LongDocuments = Literal["drop", "cut", "error"]
OPEN_SAMPLES = 1000  # samples that may still take a document
SORTED_WINDOW = 10_000  # documents sorted by length at a time
TOKENS_PER_SCAN = 2**22
FORMAT_VERSION = 3  # raise it when the same documents would be packed, or described, differently


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
    """Share of the samples' rows that the loss depends on, before it is known which tokens the noise masks."""
    num_long: int
    """Documents longer than a sample: dropped or cut."""
    num_without_targets: int
    """Documents dropped because nothing in them is supervised."""
    num_with_mask_token: int
    """Documents dropped because their text holds the mask token itself."""
    num_surplus: int
    """Documents held out, or of a validation source, for which the wanted samples have no room."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def first(self, num_samples: int) -> "Packing":
        """Return the first samples alone."""
        starts = self.starts[: num_samples + 1]
        return replace(
            self,
            documents=self.documents[: starts[-1]],
            starts=starts,
            num_targets=self.num_targets[:num_samples],
            num_tokens=self.num_tokens[:num_samples],
            num_surplus=self.num_surplus + len(self.documents) - int(starts[-1]),
        )


class PackedSamples:
    """The samples of a packing; number s gives what `materialise` returns for it."""

    def __init__(
        self,
        documents: Documents,
        packing: Packing,
        *,
        objective: Objective,
        sample_length: int,
        mask_token_id: int,
    ):
        self.documents, self.packing = documents, packing
        self.sample_length, self.objective, self.mask_token_id = sample_length, objective, mask_token_id
        self.shape = objective.sample_shape(sample_length)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        first, last = self.packing.starts[number : number + 2]
        return materialise(
            self.documents,
            self.packing.documents[first:last],
            num_tokens=self.shape.num_tokens,
            longest=self.sample_length,
            block_size=self.objective.block_size,
            mask_token_id=self.mask_token_id,
        )


def pack(
    documents: Documents,
    *,
    objective: Objective,
    sample_length: int,
    mask_token_id: int,
    long_documents: LongDocuments,
    held_out_samples: int = 0,
) -> tuple[Packing, Packing]:
    """Return the packing of the documents and that of the last ones, held out; both are kept beside the documents.

    A sample has the rows of `sample_length` tokens; a document has at most so many tokens, and takes the rows that its
    loss depends on (objective.drop_dead_rows) or all of its rows. Held out are the last documents, enough to fill
    `held_out_samples` samples; no document is in both.

    Raises:
        ValueError: sample_length is not a multiple of block_size; a document is too long and long_documents is "error";
            no document is left to train on.
    """
    block_size = objective.block_size
    if sample_length % block_size or sample_length < block_size:
        raise ValueError(
            f"data.sample_length must be a multiple of objective.block_size ({block_size}), got {sample_length}; "
            f"try {max(1, sample_length // block_size) * block_size}."
        )
    key = [FORMAT_VERSION, asdict(objective), sample_length, mask_token_id, long_documents, held_out_samples]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    files = [documents.folder / f"packing-{part}-{digest}.npz" for part in ("train", "held_out")]
    if not all(file.is_file() for file in files):
        for file, packing in zip(files, _pack(documents, objective, *key[2:]), strict=True):
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
    documents: Documents,
    objective: Objective,
    L: int,
    mask_token_id: int,
    long_documents: str,
    held_out_samples: int,
) -> Iterator[Packing]:
    lengths = np.diff(documents.offsets)
    _check_lengths(lengths, L, long_documents)
    scan = _scan(documents, objective, L, mask_token_id)
    left_out = {
        "num_long": int((lengths > L).sum()),
        "num_without_targets": int((scan.num_targets == 0).sum()),
        "num_with_mask_token": int(scan.has_mask_token.sum()),
    }
    is_kept = (scan.num_targets > 0) & ~scan.has_mask_token & ((lengths <= L) | (long_documents == "cut"))
    kept = np.flatnonzero(is_kept)
    lengths = np.minimum(lengths, L)
    capacity = objective.sample_shape(L).num_rows // objective.block_size
    costs = _costs(scan, lengths, objective, L)
    first_held_out = _first_held_out(costs[kept], held_out_samples * capacity)
    if not first_held_out:
        raise ValueError(
            f"data: no document of {documents.meta['source']} is left to train on, of {len(documents)}: "
            f"data.sample_length {L} with data.long_documents {long_documents}, "
            f"data.validation_samples {held_out_samples}, {left_out}."
        )
    for chosen, limit in ((kept[:first_held_out], None), (kept[first_held_out:], held_out_samples)):
        samples = _best_fit(chosen, costs, capacity)[:limit]
        starts = np.cumsum([0, *map(len, samples)], dtype=np.int64)
        packed = np.array([number for sample in samples for number in sample], dtype=np.int64)
        yield Packing(
            documents=packed,
            starts=starts,
            num_targets=_segment_sums(scan.num_targets[packed], starts),
            num_tokens=_segment_sums(lengths[packed], starts),
            fill=float(scan.row_blocks[packed].sum() / max(1, len(samples) * capacity)),
            num_surplus=len(chosen) - len(packed),
            **left_out,
        )


def _costs(scan: "_Scan", lengths: np.ndarray, objective: Objective, L: int) -> np.ndarray:
    """Return what each document takes of a sample, in blocks of rows: its largest share of rows, tokens or targets.

    So samples filled by this one number hold too much of none of the three.
    """
    if isinstance(objective, DraftConfig):  # windows are drawn for the sample, whatever it holds
        return scan.row_blocks
    D, shape = objective.block_size, objective.sample_shape(L)
    blocks = -(-lengths // D)
    predictions = scan.num_targets * (2 if objective.ar_loss_weight > 0 else 1)
    shares = [
        scan.row_blocks,
        -(-blocks * shape.num_rows // shape.num_tokens),
        -(-predictions * shape.num_rows // (shape.num_targets * D)),
    ]
    return np.max(shares, axis=0)


def _check_lengths(lengths: np.ndarray, L: int, long_documents: str) -> None:
    if long_documents == "error" and lengths.max() > L:
        raise ValueError(
            f"data.long_documents: {(lengths > L).sum()} documents are longer than data.sample_length ({L}), the "
            f"longest has {lengths.max()} tokens; raise data.sample_length, or set data.long_documents to drop or cut."
        )


class _Scan(NamedTuple):
    """What is learnt about each document by reading it; every array is [documents]."""

    num_targets: np.ndarray
    """Supervised targets among its first L tokens."""
    has_mask_token: np.ndarray
    row_blocks: np.ndarray
    """Blocks of rows that it needs, over both views and the clean half."""


def _scan(documents: Documents, objective: Objective, L: int, mask_token_id: int) -> _Scan:
    parts, first = [], 0
    while first < len(documents):
        end = np.searchsorted(documents.offsets, documents.offsets[first] + TOKENS_PER_SCAN, side="right")
        last = max(first + 1, int(end) - 1)
        parts.append(_scan_part(documents, first, last, objective, L, mask_token_id))
        first = last
    return _Scan(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _scan_part(documents: Documents, first: int, last: int, objective: Objective, L: int, mask_token_id: int) -> _Scan:
    span = slice(documents.offsets[first], documents.offsets[last])
    bounds = documents.offsets[first : last + 1] - span.start
    lengths = np.diff(bounds)
    position = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    is_target = documents.is_response[span] & (position >= 1) & (position < L)
    blocks = -(-np.minimum(lengths, L) // objective.block_size)
    document = np.repeat(np.arange(len(lengths)), lengths)[is_target]
    return _Scan(
        num_targets=_segment_sums(is_target, bounds),
        has_mask_token=_segment_sums(documents.tokens[span] == mask_token_id, bounds) > 0,
        row_blocks=_needed_blocks(document, position[is_target], blocks, objective),
    )


def _needed_blocks(document: np.ndarray, position: np.ndarray, blocks: np.ndarray, objective: Objective) -> np.ndarray:
    """Return how many blocks of rows each document needs; objective.drop_dead_rows is the rule, whatever is masked.

    Args:
        document, position: of every supervised target, ordered.
        blocks: [documents] whole blocks of each document.
    """
    if isinstance(objective, DraftConfig) or objective.kind == "autoregressive":
        return blocks
    if not objective.drop_dead_rows:
        return 3 * blocks
    D = objective.block_size
    row = (position - 1) // D  # the block whose last or inner row predicts the target
    by_clean = (position % D == 0) & (objective.first_token == "clean")
    predicts = np.zeros((2, blocks.sum()), bool)  # by a noised block, by a clean one
    starts = np.cumsum(blocks) - blocks
    predicts[0, (starts[document] + row)[~by_clean]] = True
    predicts[1, (starts[document] + row)[by_clean | (objective.ar_loss_weight > 0)]] = True
    reach = np.zeros(len(blocks), np.int64)  # clean blocks needed
    np.maximum.at(reach, document, row + (by_clean | (objective.ar_loss_weight > 0)))
    noised = _segment_sums(predicts[0], np.append(starts, blocks.sum()))
    return 2 * noised + reach


def _segment_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[starts])


def _first_held_out(costs: np.ndarray, cost_wanted: int) -> int:
    """Return where the shortest tail of documents that cost `cost_wanted` together starts."""
    if not cost_wanted:
        return len(costs)
    from_end = np.cumsum(costs[::-1])
    return max(0, len(costs) - int(np.searchsorted(from_end, cost_wanted)) - 1)


def _best_fit(chosen: np.ndarray, costs: np.ndarray, capacity: int) -> list[list[int]]:
    """Put each document into the fullest open sample that has room for it; return the documents of each sample.

    Documents come in order, long before short ones within a window: that fills better. At most OPEN_SAMPLES stay open;
    beyond that the fullest is closed. Samples are ordered by when they were opened.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # open samples by the room still free
    samples, num_open = [], 0
    for number in _costliest_first(chosen, costs):
        need = int(costs[number])
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


def _costliest_first(chosen: np.ndarray, costs: np.ndarray) -> Iterator[int]:
    for first in range(0, len(chosen), SORTED_WINDOW):
        window = chosen[first : first + SORTED_WINDOW]
        yield from window[np.argsort(-costs[window], kind="stable")].tolist()


def materialise(
    documents: Documents,
    numbers: np.ndarray,
    *,
    num_tokens: int,
    longest: int,
    block_size: int,
    mask_token_id: int,
) -> dict[str, np.ndarray]:
    """Return one sample that holds the documents `numbers`, with places for `num_tokens` tokens (L below).

    Args:
        longest: documents are cut after so many tokens.
    Returns:
        tokens: [L] int64, the mask token wherever no document is.
        is_response: [L] bool, false on padding.
        document: [L] int64, 1.. by document, the padding of its last block included; 0 in the rest of the sample.
        position: [L] int64, from 0 in each document and in the rest.
        num_tokens: int64 document tokens.
    """
    tokens = np.full(num_tokens, mask_token_id, np.int64)
    is_response = np.zeros(num_tokens, bool)
    document = np.zeros(num_tokens, np.int64)
    position = np.zeros(num_tokens, np.int64)
    start = num_document_tokens = 0
    for label, number in enumerate(numbers, start=1):
        begin = documents.offsets[number]
        length = int(min(documents.offsets[number + 1] - begin, longest))
        end = start - (-length // block_size) * block_size
        tokens[start : start + length] = documents.tokens[begin : begin + length]
        is_response[start : start + length] = documents.is_response[begin : begin + length]
        document[start:end] = label
        position[start:end] = np.arange(end - start)
        start, num_document_tokens = end, num_document_tokens + length
    position[start:] = np.arange(num_tokens - start)
    return {
        "tokens": tokens,
        "is_response": is_response,
        "document": document,
        "position": position,
        "num_tokens": np.int64(num_document_tokens),
    }
