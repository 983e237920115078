"""Verified decoding: the same tokens as token by token, whatever the drafts; in float32."""

import pytest
import torch

from decoding.test_engine import MASK, make_model, make_prompts
from fastdllm.decoding.reference import Sampler, causal_logits, decode_autoregressive, decode_verified, draft_logits

STOP = frozenset({256, 258})  # the byte tokenizer's
NEAR = 1e-3  # a smaller lead of the best token over the second may come out the other way in another order of sums


def check_same(model, prompt, tokens, expected):
    """Assert that the tokens are the same, or first differ where greedy decoding itself is nearly a tie."""
    if tokens == expected:
        return
    first = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
    assert first is not None, f"one answer stops early: {len(tokens)} and {len(expected)} tokens"
    best, second = causal_logits(model, prompt + expected[:first])[-1].topk(2).values.tolist()
    assert best - second < NEAR, f"token {first} differs, where the best leads by {best - second}"
    print(f"tie: token {first} of an answer, lead {best - second:.1e}")


@pytest.mark.parametrize(
    ("draft_length", "groups"), [(1, None), (2, None), (3, (0, 2)), (5, (0,)), (8, None), (16, (0, 1, 16))]
)
def test_the_plain_verifying_decoder_gives_the_tokens_of_token_by_token(draft_length, groups):
    model, prompts = make_model(context="causal"), make_prompts((1, 4, 7, 8, 13, 20))
    options = dict(max_new_tokens=18, stop_ids=STOP)
    for prompt in prompts:
        expected = decode_autoregressive(model, prompt, **options)
        found = decode_verified(model, prompt, **options, draft_length=draft_length, groups=groups)
        check_same(model, prompt, found.tokens, expected)
        assert len(found.accepted) == len(found.rows) <= len(found.tokens) <= sum(found.accepted) + len(found.accepted)
        assert found.drafted[0] == 0 and max(found.drafted) <= draft_length


def test_accepted_drafts_save_passes_and_every_pass_gives_a_token_more(monkeypatch):
    # a model that says the same token after everything: every draft is right
    model, prompt = make_model(context="causal"), [3, 4]
    constant = torch.zeros(272)
    constant[5] = 1.0
    monkeypatch.setattr(model, "logits", lambda hidden: constant.expand(*hidden.shape[:-1], -1))
    found = decode_verified(model, prompt, max_new_tokens=13, stop_ids=STOP, draft_length=3)
    assert found.tokens == [5] * 13
    assert found.accepted == [0, 3, 3, 3] and found.drafted == [0, 3, 3, 3]  # 1 + 4 + 4 + 4
    assert found.rows == [1 + 3, *[4 + 4 * 3] * 3]
    few = decode_verified(model, prompt, max_new_tokens=13, stop_ids=STOP, draft_length=3, groups=(0, 2))
    # accepted 3, nearest group 2: its first draft stands where the pass's own token does
    assert few.tokens == [5] * 13 and few.drafted == [0, 3, 2, 3, 0] and few.rows[1] == 4 + 2 * 3


def test_a_draft_is_made_by_the_group_of_the_accepted_length_alone():
    model, prompt = make_model(context="causal"), make_prompts((6,))[0]
    drafts = [9, 8, 7]
    with torch.no_grad():
        together = draft_logits(model, prompt + drafts, 5, [0, 1, 3], 4)
        for number, length in enumerate([0, 1, 3]):
            alone = draft_logits(model, prompt + drafts[:length], 5, [length], 4)
            torch.testing.assert_close(together[1][number], alone[1][0])
        torch.testing.assert_close(together[0], causal_logits(model, prompt + drafts)[5:])


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_drawn_answer_is_that_of_token_by_token_with_the_same_seed(options):
    model = make_model(context="causal")
    for seed, prompt in enumerate(make_prompts((1, 5, 8, 12))):
        sampler = Sampler(**options, seed=seed)
        run = dict(max_new_tokens=16, stop_ids=STOP, sampler=sampler)
        expected = decode_autoregressive(model, prompt, **run)
        assert decode_verified(model, prompt, **run, draft_length=4).tokens == expected


def test_the_mask_token_is_never_chosen_and_never_seen_by_clean_rows():
    model, prompt = make_model(context="causal"), make_prompts((6,))[0]
    found = decode_verified(model, prompt, max_new_tokens=20, stop_ids=frozenset(), draft_length=4)
    model.qwen.model.embed_tokens.weight.data[MASK] = 100.0  # the worst drafts
    spoilt = decode_verified(model, prompt, max_new_tokens=20, stop_ids=frozenset(), draft_length=4)
    assert MASK not in found.tokens and spoilt.tokens == found.tokens
