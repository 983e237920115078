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
FLEX_TILE = 128


class Rows(NamedTuple):
    """What each row of a training pass is; every tensor is [B, R] int64."""

    half: Tensor
    """CLEAN, VIEW_A or VIEW_B."""
    document: Tensor
    """1, 2, ... inside the sample; 0 for the padding at its end."""
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
    halves = torch.tensor([VIEW_A, VIEW_B, CLEAN], device=document.device).repeat_interleave(document.shape[1])
    return Rows(halves.expand(document.shape[0], -1), document.repeat(1, 3), position.repeat(1, 3))


def clean_rows(document: Tensor, position: Tensor) -> Rows:
    """Return the rows of samples without views, for the autoregressive objective; all are [B, L]."""
    return Rows(torch.full_like(document, CLEAN), document, position)


def training_attention(rows: Rows, block_size: int, context_attention: ContextAttention) -> Predicate:
    """Return the predicate of the training rows.

    A noised row attends to its own block in its own view, in both directions, and to the clean rows of strictly earlier
    blocks. A clean row attends to clean rows: of its own and earlier blocks ("block"), or at its own and earlier
    positions ("causal", which keeps an exact autoregressive mode). No row leaves its document.
    Source: Fast-dLLM v2, whose mask has one view beside each clean half; here both views share one.
    """
    half, document, position = rows
    clean_unit = block_size if context_attention == "block" else 1

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_key_clean = half[batch, key] == CLEAN
        is_query_clean = half[batch, query] == CLEAN
        is_same_document = document[batch, query] == document[batch, key]
        at_query, at_key = position[batch, query], position[batch, key]
        is_earlier_block = at_key // block_size < at_query // block_size
        is_own_block = at_key // block_size == at_query // block_size
        from_clean = is_query_clean & is_key_clean & (at_key // clean_unit <= at_query // clean_unit)
        from_noised = ~is_query_clean & is_key_clean & is_earlier_block
        inside_view = ~is_query_clean & (half[batch, key] == half[batch, query]) & is_own_block
        return is_same_document & (from_clean | from_noised | inside_view)

    return allowed


def dense_attention_mask(predicate: Predicate, batch_size: int, num_rows: int, device: torch.device) -> Tensor:
    """Return the predicate as [B, 1, R, R] bool: the form for SDPA and for reading."""
    rows = torch.arange(num_rows, device=device)
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros((), dtype=torch.int64, device=device)
    return predicate(batch, head, rows.view(1, 1, -1, 1), rows.view(1, 1, 1, -1))


class BlockMaskBuilder:
    """Builds the BlockMasks of training batches of one shape.

    The predicate reads buffers that every batch overwrites, so a compiled kernel meets the same function and the same
    tensors at each step and is compiled once. A batch's mask is valid until the next one is built.
    """

    def __init__(self, rows: Rows, block_size: int, context_attention: ContextAttention):
        num_rows = rows.position.shape[1]
        if num_rows % FLEX_TILE:
            raise ValueError(
                f"FlexAttention needs a multiple of {FLEX_TILE} rows, got {num_rows}; use a sample_length that is one."
            )
        self.buffers = Rows(*(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in rows))
        self.predicate = training_attention(self.buffers, block_size, context_attention)

    def fits(self, rows: Rows) -> bool:
        """Return whether `rows` have this builder's shape and device."""
        own = self.buffers.position
        return rows.position.shape == own.shape and rows.position.device == own.device

    def build(self, rows: Rows) -> BlockMask:
        """Return the BlockMask of `rows`: tiles with no allowed pair are left out, full ones need no predicate."""
        for buffer, tensor in zip(self.buffers, rows, strict=True):
            buffer.copy_(tensor)
        batch_size, num_rows = rows.position.shape
        dense = dense_attention_mask(self.predicate, batch_size, num_rows, rows.position.device)
        tiles = dense.view(batch_size, 1, num_rows // FLEX_TILE, FLEX_TILE, num_rows // FLEX_TILE, FLEX_TILE)
        is_full, is_used = tiles.all(5).all(3), tiles.any(5).any(3)  # [B, 1, R / 128, R / 128]
        return BlockMask.from_kv_blocks(
            *_tile_lists(is_used & ~is_full),
            *_tile_lists(is_full),
            BLOCK_SIZE=FLEX_TILE,
            mask_mod=self.predicate,
            seq_lengths=(num_rows, num_rows),
        )


def _tile_lists(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles each row of tiles lists, and their numbers first, as FlexAttention reads them (int32)."""
    order = is_listed.int().argsort(dim=-1, descending=True, stable=True)
    return is_listed.sum(-1).int(), order.int()


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


def count_attention_pairs(rows: Rows, block_size: int, context_attention: ContextAttention) -> Tensor:
    """Return how many (query, key) pairs `training_attention` allows for whole, block-aligned documents, int64 [].

    A clean row at position p in block k sees (k + 1) blocks ("block") or p + 1 keys ("causal"); a noised one (k + 1)
    blocks: k clean ones and its own. Documents are padded to whole blocks, so no block is cut short.
    """
    blocks_seen = (rows.position // block_size + 1) * block_size
    is_clean = rows.half == CLEAN
    seen_by_clean = blocks_seen if context_attention == "block" else rows.position + 1
    return torch.where(is_clean, seen_by_clean, blocks_seen).sum()
