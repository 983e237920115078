"""The attention predicates against slow loops written from the paper's table."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.testing import assert_close

from fastdllm import masks


def make_sample():
    """Two documents of 2 and 3 blocks of 4 tokens, then a block of padding: document and position, [1, 24] each."""
    document = torch.tensor([[1] * 8 + [2] * 12 + [0] * 4])
    position = torch.cat([torch.arange(8), torch.arange(12), torch.arange(4)])[None]
    return document, position


def allowed_by_table(rows, query, key, block_size, context):
    """Method.md 2.3's table, for one pair; the two views never see each other."""
    half, document, position = (tensor[0] for tensor in rows)
    if document[query] != document[key]:
        return False
    query_block, key_block = position[query] // block_size, position[key] // block_size
    if half[query] == masks.CLEAN:
        if half[key] != masks.CLEAN:
            return False
        return position[key] <= position[query] if context == "causal" else key_block <= query_block
    if half[key] == masks.CLEAN:
        return key_block < query_block
    return half[key] == half[query] and key_block == query_block


@pytest.mark.parametrize("context", ["block", "causal"])
def test_training_attention_equals_the_table_for_every_pair(context):
    rows = masks.training_rows(*make_sample())
    num_rows = rows.half.shape[1]
    dense = masks.dense_attention_mask(masks.training_attention(rows, 4, context), 1, num_rows, torch.device("cpu"))
    for query in range(num_rows):
        for key in range(num_rows):
            assert bool(dense[0, 0, query, key]) == bool(allowed_by_table(rows, query, key, 4, context))


@pytest.mark.parametrize("context", ["block", "causal"])
def test_attention_pairs_are_counted_exactly(context):
    for rows in (masks.training_rows(*make_sample()), masks.clean_rows(*make_sample())):
        num_rows = rows.half.shape[1]
        dense = masks.dense_attention_mask(masks.training_attention(rows, 4, context), 1, num_rows, torch.device("cpu"))
        assert torch.equal(masks.count_attention_pairs(rows, 4, context), dense.sum(-1)[:, 0])


@pytest.mark.parametrize("context", ["block", "causal"])
def test_block_masks_equal_dense_masks_for_one_batch_after_another(context):
    position = torch.cat([torch.arange(96), torch.arange(160)])[None]
    first = masks.training_rows(torch.tensor([[1] * 96 + [2] * 160]), position)
    second = masks.training_rows(torch.tensor([[1] * 256]), torch.arange(256)[None])
    builder = masks.BlockMaskBuilder(1, 768, 768, 32, context, torch.device("cpu"))
    query, key, value = torch.randn(3, 1, 2, 768, 16)
    for rows in (first, second):
        predicate = masks.training_attention(rows, 32, context)
        dense = masks.dense_attention_mask(predicate, 1, 768, torch.device("cpu"))
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
        ours = builder.build(rows)
        assert_close(flex_attention(query, key, value, block_mask=ours), expected)
        theirs = create_block_mask(predicate, 1, None, 768, 768, device="cpu")
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    with pytest.raises(ValueError, match="multiple of 128"):
        masks.BlockMaskBuilder(1, 72, 72, 4, context, torch.device("cpu"))


@pytest.mark.parametrize("context", ["block", "causal"])
def test_block_masks_of_chosen_rows_equal_dense_masks(context):
    document, position = torch.tensor([[1] * 96 + [2] * 160]), torch.cat([torch.arange(96), torch.arange(160)])[None]
    rows = masks.training_rows(document, position)
    index = torch.randperm(768, generator=torch.Generator().manual_seed(0))[:256].sort().values[None]
    queries = masks.Rows(*(tensor.gather(1, index) for tensor in rows))
    dense = masks.dense_attention_mask(
        masks.training_attention(rows, 32, context, queries), 1, 768, torch.device("cpu"), 256
    )
    whole = masks.dense_attention_mask(masks.training_attention(rows, 32, context), 1, 768, torch.device("cpu"))
    assert torch.equal(dense[0, 0], whole[0, 0, index[0]])
    block_mask = masks.BlockMaskBuilder(1, 256, 768, 32, context, torch.device("cpu")).build(rows, queries)
    query, key, value = torch.randn(1, 2, 256, 16), torch.randn(1, 2, 768, 16), torch.randn(1, 2, 768, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    assert_close(flex_attention(query, key, value, block_mask=block_mask), expected)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_decode_attention_shows_own_and_earlier_blocks_only(context):
    positions, keys = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, -1]])
    allowed = masks.decode_attention_mask(positions, keys, 4, context)[0, 0]
    for row, position in enumerate(range(4, 8)):
        last = position if context == "causal" else 7
        assert allowed[row].tolist() == [0 <= key <= last for key in keys[0].tolist()]
