"""Who may attend to whom: predicates over rows, and their two forms (dense bool for SDPA, BlockMask for FlexAttention).

A training row is one token in one part of its sample: one of the two noised views, or the clean half. Three integers
of it (half, document, position) decide everything: attention, rotary angle and loss. Source: method.md 2.3.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

ContextAttention = Literal["block", "causal"]
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) indices -> bool

CLEAN, VIEW_A, VIEW_B = 0, 1, 2
EMPTY = -1
FLEX_TILE = 128
MOST_BLOCKS = 2**14  # of a sample, so that codes of documents and blocks fit into 32 bits
GROUP_SEES_BOTH_WAYS = True  # a drafting row sees the rows behind it in its group too, not only those before it


class Rows(NamedTuple):
    """What each row of a training pass is; every tensor is [B, R] int64."""

    half: Tensor
    """CLEAN, VIEW_A or VIEW_B."""
    document: Tensor
    """1, 2, ... inside the sample; 0 for the padding at its end; EMPTY for a row that holds nothing."""
    position: Tensor
    """Position inside the document; the rotary angle, and the block as position // block_size."""


def training_rows(document: Tensor, position: Tensor) -> Rows:
    """Return the rows of samples in the order view a | view b | clean: three rows for each token.

    Args:
        document: [B, L] int64.
        position: [B, L] int64.
    Returns:
        Rows of [B, 3L].
    """
    L = document.shape[1]
    # worked out on the device: a constant copied to it would make the host wait for all that is queued
    halves = (torch.arange(3 * L, device=document.device) // L + VIEW_A) % 3  # VIEW_A, VIEW_B, CLEAN
    return Rows(halves.expand(document.shape[0], -1), document.repeat(1, 3), position.repeat(1, 3))


def clean_rows(document: Tensor, position: Tensor) -> Rows:
    """Return the rows of samples without views, for the autoregressive objective; all are [B, L]."""
    return Rows(torch.full_like(document, CLEAN), document, position)


def training_attention(
    rows: Rows, block_size: int, context_attention: ContextAttention, queries: Rows | None = None
) -> Predicate:
    """Return the predicate by which `queries` (all rows, if None) attend to the training rows.

    A noised row attends to its own block in its own view, in both directions, and to the clean rows of strictly earlier
    blocks. A clean row attends to clean rows: of its own and earlier blocks ("block"), or at its own and earlier
    positions ("causal", which keeps an exact autoregressive mode). No row leaves its document.
    Source: Fast-dLLM v2, whose mask has one view beside each clean half; here both views share one.
    """
    half, document, position = rows
    query_half, query_document, query_position = queries or rows
    clean_unit = block_size if context_attention == "block" else 1

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_key_clean = half[batch, key] == CLEAN
        is_query_clean = query_half[batch, query] == CLEAN
        is_same_document = query_document[batch, query] == document[batch, key]
        at_query, at_key = query_position[batch, query], position[batch, key]
        is_earlier_block = at_key // block_size < at_query // block_size
        is_own_block = at_key // block_size == at_query // block_size
        from_clean = is_query_clean & is_key_clean & (at_key // clean_unit <= at_query // clean_unit)
        from_noised = ~is_query_clean & is_key_clean & is_earlier_block
        inside_view = ~is_query_clean & (half[batch, key] == query_half[batch, query]) & is_own_block
        return is_same_document & (from_clean | from_noised | inside_view)

    return allowed


def dense_attention_mask(
    predicate: Predicate, batch_size: int, num_keys: int, device: torch.device, num_queries: int | None = None
) -> Tensor:
    """Return the predicate as [B, 1, T, S] bool: the form for SDPA and for reading; as many queries as keys if None."""
    keys = torch.arange(num_keys, device=device)
    queries = keys if num_queries is None else torch.arange(num_queries, device=device)
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros((), dtype=torch.int64, device=device)
    return predicate(batch, head, queries.view(1, 1, -1, 1), keys.view(1, 1, 1, -1))


class _Codes(NamedTuple):
    """A row as integers that a kernel compares quickly; each [B, R] int32."""

    own: Tensor
    """The same for the rows of one block of one half."""
    place: Tensor
    """Grows with document, then block."""
    first_place: Tensor
    """`place` of the document's first block."""
    clean_place: Tensor
    """`place` of a clean row; beyond every place for others."""
    order: Tensor
    """A clean row's position, where clean rows attend token by token; 0 for others."""


def _codes(rows: Rows, block_size: int, context_attention: ContextAttention) -> _Codes:
    half, document, position = rows
    first_place = document * MOST_BLOCKS
    place = first_place + position // block_size
    is_ordered = (half == CLEAN) & (context_attention == "causal")
    codes = _Codes(
        own=3 * place + half,
        place=place,
        first_place=first_place,
        clean_place=torch.where(half == CLEAN, place, torch.iinfo(torch.int32).max),
        order=torch.where(is_ordered, position, 0),
    )
    return _Codes(*(tensor.int() for tensor in codes))


def _coded_attention(codes: _Codes, queries: _Codes, context_attention: ContextAttention) -> Predicate:
    """Return the predicate of `training_attention` for the rows behind the codes, in a few comparisons."""

    def in_blocks(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        clean_place = codes.clean_place[batch, key]
        is_earlier = (clean_place < queries.place[batch, query]) & (clean_place >= queries.first_place[batch, query])
        return (codes.own[batch, key] == queries.own[batch, query]) | is_earlier

    def in_order(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        clean_place = codes.clean_place[batch, key]
        is_earlier = (clean_place < queries.place[batch, query]) & (clean_place >= queries.first_place[batch, query])
        is_own = codes.own[batch, key] == queries.own[batch, query]
        return (is_own & (codes.order[batch, key] <= queries.order[batch, query])) | is_earlier

    return in_blocks if context_attention == "block" else in_order


class BlockMaskBuilder:
    """Builds the BlockMasks of training batches of one shape.

    The predicate reads buffers that every batch overwrites, so a compiled kernel meets the same function and the same
    tensors at each step and is compiled once. A batch's mask is valid until the next one is built.

    Which tiles hold an allowed pair is decided for whole blocks of keys, whose rows are all seen or all unseen but for
    the own block of a token-causal clean row; so a mask costs R / block_size as much as a look at every pair.
    """

    def __init__(
        self,
        batch_size: int,
        num_queries: int,
        num_rows: int,
        block_size: int,
        context_attention: ContextAttention,
        device: torch.device,
    ):
        for name, number in (("rows", num_rows), ("queries", num_queries)):
            if number % FLEX_TILE:
                raise ValueError(
                    f"FlexAttention needs a multiple of {FLEX_TILE} {name}, got {number}; use a sample_length that is "
                    "one."
                )
        if num_rows // block_size > MOST_BLOCKS:
            raise ValueError(
                f"a sample may have {MOST_BLOCKS} blocks of {block_size} rows, got {num_rows // block_size}; use a "
                "smaller sample_length."
            )
        self.block_size, self.context_attention = block_size, context_attention
        self.lengths = (num_queries, num_rows)
        self.codes = _empty_codes(batch_size, num_rows, device)
        self.query_codes = self.codes if num_queries == num_rows else _empty_codes(batch_size, num_queries, device)
        self.predicate = _coded_attention(self.codes, self.query_codes, context_attention)

    def build(self, rows: Rows, queries: Rows | None = None) -> BlockMask:
        """Return the BlockMask of `queries` [B, T] (all rows, if None) on `rows` [B, R], which are whole blocks.

        Tiles without an allowed pair are left out; in full ones the predicate is not asked.
        """
        if (queries is None) != (self.query_codes is self.codes):
            raise ValueError(
                f"this builder's queries and rows are {self.lengths}; queries go with fewer than all rows."
            )
        for buffers, some in ((self.codes, rows), (self.query_codes, queries or rows)):
            for buffer, code in zip(buffers, _codes(some, self.block_size, self.context_attention), strict=True):
                buffer.copy_(code)
        is_used, is_full = self._tiles(rows, queries)
        return BlockMask.from_kv_blocks(
            *_tile_lists(is_used & ~is_full),
            *_tile_lists(is_full),
            BLOCK_SIZE=FLEX_TILE,
            mask_mod=self.predicate,
            seq_lengths=self.lengths,
        )

    def _tiles(self, rows: Rows, queries: Rows | None) -> tuple[Tensor, Tensor]:
        """Return which tiles hold an allowed pair, and which hold nothing else, [B, 1, T / 128, R / 128] bool."""
        blocks = Rows(*(tensor[:, :: self.block_size] for tensor in rows))
        stride = self.block_size if queries is None else 1  # all rows come in blocks, chosen ones one by one
        queries = blocks if queries is None else queries
        batch_size, num_blocks = blocks.position.shape
        num_queries = queries.position.shape[1]
        seen = dense_attention_mask(
            training_attention(blocks, self.block_size, "block", queries),
            batch_size,
            num_blocks,
            blocks.position.device,
            num_queries,
        )
        seen_whole = seen
        if self.context_attention == "causal":
            is_clean_pair = (queries.half == CLEAN)[:, None, :, None] & (blocks.half == CLEAN)[:, None, None, :]
            unit = (tensor.position // self.block_size for tensor in (queries, blocks))
            at_query, at_key = unit
            seen_whole = seen & ~(is_clean_pair & (at_query[:, None, :, None] == at_key[:, None, None, :]))
        per_tile = (FLEX_TILE // stride, FLEX_TILE // self.block_size)
        shape = (batch_size, 1, num_queries // per_tile[0], per_tile[0], num_blocks // per_tile[1], per_tile[1])
        return seen.view(shape).any(5).any(3), seen_whole.view(shape).all(5).all(3)


def _empty_codes(batch_size: int, num_rows: int, device: torch.device) -> _Codes:
    return _Codes(*(torch.zeros(batch_size, num_rows, dtype=torch.int32, device=device) for _ in _Codes._fields))


def _tile_lists(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles each row of tiles lists, and their numbers first, as FlexAttention reads them (int32)."""
    order = is_listed.int().argsort(dim=-1, descending=True, stable=True)
    return is_listed.sum(-1).int(), order.int()


class SeenPlaces(NamedTuple):
    """The clean rows of its sample that each row of a drafting pass sees, by place; every tensor is [B, T] int64."""

    first: Tensor
    last: Tensor
    """Included; below `first` where none is seen."""


def draft_attention(seen: SeenPlaces, num_clean: int, window: int) -> Predicate:
    """Return the predicate by which rows attend to clean rows 0 .. num_clean - 1 and, behind them, to themselves.

    Args:
        window: every so many rows are a window, which sees itself; 0 for clean rows, whose keys are all clean ones.
    """
    first, last = seen

    def clean_places(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[batch, query]) & (key <= last[batch, query])

    def with_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = key - num_clean
        is_own = (own >= 0) & (own // window == query // window)
        if not GROUP_SEES_BOTH_WAYS:
            is_own = is_own & (own <= query)
        return clean_places(batch, head, query, key) | is_own

    return with_window if window else clean_places


class DraftMaskBuilder:
    """Builds the BlockMasks of `draft_attention` for batches of one shape, as BlockMaskBuilder does for its own."""

    def __init__(self, batch_size: int, num_queries: int, num_clean: int, window: int, device: torch.device):
        for name, number in (("clean rows", num_clean), ("rows", num_queries)):
            if number % FLEX_TILE:
                raise ValueError(
                    f"FlexAttention needs a multiple of {FLEX_TILE} {name}, got {number}; use a sample_length that is "
                    "one, and a draft.rows_per_token with which their product is."
                )
        self.num_clean, self.window = num_clean, window
        self.lengths = (num_queries, num_clean + (num_queries if window else 0))
        self.seen = SeenPlaces(*(torch.zeros(batch_size, num_queries, dtype=torch.int32, device=device) for _ in "ab"))
        self.predicate = draft_attention(self.seen, num_clean, window)

    def build(self, seen: SeenPlaces) -> BlockMask:
        """Return the BlockMask of rows that see `seen`; valid until the next one is built."""
        for buffer, values in zip(self.seen, seen, strict=True):
            buffer.copy_(values)
        is_used, is_full = self._tiles(seen)
        return BlockMask.from_kv_blocks(
            *_tile_lists(is_used & ~is_full),
            *_tile_lists(is_full),
            BLOCK_SIZE=FLEX_TILE,
            mask_mod=self.predicate,
            seq_lengths=self.lengths,
        )

    def _tiles(self, seen: SeenPlaces) -> tuple[Tensor, Tensor]:
        """Return which tiles hold an allowed pair, and which hold nothing else, [B, 1, T / 128, S / 128] bool."""
        start = torch.arange(0, self.num_clean, FLEX_TILE, device=seen.first.device)
        end = start + FLEX_TILE - 1
        first, last = seen.first[..., None], seen.last[..., None]
        is_used, is_full = (first <= end) & (last >= start) & (first <= last), (first <= start) & (last >= end)
        shape = (len(first), 1, -1, FLEX_TILE, len(start))
        is_used, is_full = is_used.view(shape).any(3), is_full.view(shape).all(3)
        if not self.window:
            return is_used, is_full
        # a window never reaches over a tile, for its size divides a tile's
        own = torch.eye(is_used.shape[2], dtype=torch.bool, device=start.device).expand(len(first), 1, -1, -1)
        is_one_window = self.window == FLEX_TILE and GROUP_SEES_BOTH_WAYS
        return torch.cat([is_used, own], dim=3), torch.cat([is_full, own & is_one_window], dim=3)


def decode_attention_mask(
    query_position: Tensor, key_position: Tensor, block_size: int, context_attention: ContextAttention
) -> Tensor:
    """Return who may attend to whom in a clean pass (prefill, append): [B, 1, T, S] bool.

    Args:
        query_position: [B, T] int64 absolute positions of the rows computed.
        key_position: [B, S] int64 absolute positions of the keys; negative where there is no key.
    """
    scale = block_size if context_attention == "block" else 1
    order = torch.div(key_position, scale, rounding_mode="floor")[:, None, None, :]
    is_key = (key_position >= 0)[:, None, None, :]
    return is_key & (order <= torch.div(query_position, scale, rounding_mode="floor")[:, None, :, None])


def draft_attention_mask(position: Tensor, last_clean: Tensor, group: Tensor) -> Tensor:
    """Return who may attend to whom in a pass that verifies drafts and makes the next ones: [B, 1, T, T] bool.

    A clean row sees the clean rows up to its own position, token by token. A drafting row, which holds the mask token,
    sees the clean rows up to `last_clean` and the rows of its own group.

    Args:
        position: [B, T] int64.
        last_clean: [B, T] int64: position of the last clean row that a row sees; of a clean row its own.
        group: [B, T] int64: 1, 2, ... for the groups of drafting rows, 0 for clean rows.
    """
    is_clean_key = (group == 0)[:, None, :] & (position[:, None, :] <= last_clean[:, :, None])
    is_own = (group[:, :, None] == group[:, None, :]) & (group != 0)[:, :, None]
    if not GROUP_SEES_BOTH_WAYS:
        is_own = is_own & (position[:, None, :] <= position[:, :, None])
    return (is_clean_key | is_own)[:, None]


def count_attention_pairs(rows: Rows, block_size: int, context_attention: ContextAttention) -> Tensor:
    """Return how many keys each row attends to under `training_attention`, int64 [B, R].

    A clean row at position p in block k sees (k + 1) blocks ("block") or p + 1 keys ("causal"); a noised one (k + 1)
    blocks: k clean ones and its own. Documents are padded to whole blocks, so no block is cut short. Empty rows see
    their own block.
    """
    blocks_seen = (rows.position // block_size + 1) * block_size
    seen_by_clean = blocks_seen if context_attention == "block" else rows.position + 1
    seen_by_noised = torch.where(rows.document == EMPTY, block_size, blocks_seen)
    return torch.where(rows.half == CLEAN, seen_by_clean, seen_by_noised)
