"""Verified decoding: the same tokens as token by token, whatever the drafts; in float32."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import make_qwen

from decoding.test_engine import MASK, by_index, make_model, make_prompts
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.reference import Sampler, causal_logits, decode_autoregressive, decode_verified, draft_logits
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.state import Phase
from fastdllm.decoding.verify import VerifySteps
from fastdllm.model import BlockDiffusionLM

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


def make_engine(model, tokenizer, batch_size=4, mode="diffusion", engine=None, **decode):
    decode = {"policy": "verified", **decode} if mode == "diffusion" else decode
    return Engine(model, tokenizer, mode=mode, decode=DecodeConfig(**decode), batch_size=batch_size, **(engine or {}))


def make_requests(prompts, most=30, **options):
    return [Request(prompt=prompt, max_new_tokens=most, seed=i, **options) for i, prompt in enumerate(prompts)]


def answers(engine, requests):
    return sorted(engine.run(requests), key=by_index)


LENGTHS = (1, 5, 7, 8, 9, 16, 21)


@pytest.mark.parametrize("seed", range(10))
def test_500_answers_are_those_of_token_by_token(byte_tokenizer, seed):
    """50 random prompts on each of ten random models; draft lengths 1 to 16, several batch sizes and groups."""
    model = make_model(context="causal", seed=seed, layers=2)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (50,), generator=generator).tolist()
    requests = make_requests(make_prompts(lengths, seed), most=16)
    requests = [replace(one, max_new_tokens=1 + (7 * i + seed) % 24) for i, one in enumerate(requests)]
    expected = answers(make_engine(model, byte_tokenizer, batch_size=50, mode="ar"), requests)
    for draft_length in (1 + seed, 16 - seed):
        groups = ("all", f"0,{draft_length}", "0")[seed % 3]
        engine = make_engine(
            model, byte_tokenizer, 50 // (1 + seed % 4), draft_length=draft_length, draft_groups=groups
        )
        for found, one, request in zip(answers(engine, requests), expected, requests, strict=True):
            check_same(model, request.prompt, found.tokens, one.tokens)
            assert found.append_passes == found.full_passes == 0


@pytest.mark.parametrize(("draft_length", "groups"), [(1, "all"), (4, "all"), (6, "0,2,5"), (3, "0")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_engine_runs_the_passes_of_the_plain_decoder(byte_tokenizer, draft_length, groups, temperature):
    model, prompts = make_model(context="causal"), make_prompts(LENGTHS)
    options = dict(temperature=temperature, top_p=0.9)
    engine = make_engine(model, byte_tokenizer, 3, draft_length=draft_length, draft_groups=groups, **options)
    lengths = tuple(range(draft_length + 1)) if groups == "all" else tuple(map(int, groups.split(",")))
    for found, prompt in zip(answers(engine, make_requests(prompts)), prompts, strict=True):
        sampler = Sampler(**options, seed=found.index)
        run = dict(max_new_tokens=30, stop_ids=engine.stop_ids, sampler=sampler)
        plain = decode_verified(model, prompt, **run, draft_length=draft_length, groups=lengths)
        assert found.tokens == plain.tokens
        assert found.denoise_passes == len(plain.accepted)
        assert found.accepted_drafts == sum(plain.accepted)
        rejected = sum(accepted < drafted for accepted, drafted in zip(plain.accepted, plain.drafted, strict=True))
        assert found.checked_drafts == found.accepted_drafts + rejected
        rows = 1 + draft_length + len(lengths) * draft_length
        assert found.rows_run == model.num_layers * (rows * found.denoise_passes + len(prompt) - 1)


class GivenDrafts(VerifySteps):
    """Steps that draft the right tokens, with errors: each is wrong with a chance of 0.2."""

    truth: dict = {}  # prompt -> the whole answer

    def _draft(self, slots, is_served, best_of, accepted, lengths, plan):
        generator = torch.Generator().manual_seed(int(self.state.numbers.sum()))
        at = self.state.take(slots)
        for number, slot in enumerate(slots.tolist()):
            if is_served[number]:
                length, start = int(at.prompt_length[number]), int(at.start[number] + accepted[number]) + 2
                prompt = tuple(self.state.tokens[slot, :length].tolist())
                right = (self.truth[prompt] + [0] * 100)[start - length :][: plan.length]
                wrong = torch.rand(plan.length, generator=generator) < 0.2
                self.drafts[slot, : plan.length] = torch.where(wrong, 1, torch.tensor(right))
        return torch.full_like(accepted, plan.length)


class NotedDrafts(VerifySteps):
    """Steps that note what each pass drafts for the slot that has the prompt."""

    notes: dict = {}  # prompt -> drafts, pass by pass
    heads = 0  # rows for which the head is asked once in a pass, as on a GPU

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.one_head_rows = self.heads

    def verify(self, slots, plan):
        before = self.state.take(slots)
        super().verify(slots, plan)
        at = self.state.take(slots)
        for number, slot in enumerate(slots.tolist()):
            if before.phase[number] == Phase.VERIFY:
                prompt = tuple(self.state.tokens[slot, : int(at.prompt_length[number])].tolist())
                drafts = self.drafts[slot, : int(at.num_drafts[number])].tolist()
                self.notes.setdefault(prompt, []).append(drafts)


@pytest.mark.parametrize("heads", [0, 60, 10**6])  # 60: for one slot, not for three
@pytest.mark.parametrize(("draft_length", "groups"), [(4, (0, 1, 2, 3, 4)), (6, (0, 2, 5))])
def test_the_engine_makes_the_drafts_of_the_plain_decoder(byte_tokenizer, monkeypatch, draft_length, groups, heads):
    """With a head that knows few tokens, so that drafts are often right."""
    model, prompts = make_model(context="causal", seed=1), make_prompts(LENGTHS)
    logits = model.logits

    def few(hidden):
        found = logits(hidden)
        found[..., 3:] = -torch.inf
        return found

    monkeypatch.setattr(model, "logits", few)
    monkeypatch.setattr(NotedDrafts, "heads", heads)
    options = dict(draft_length=draft_length, draft_groups=",".join(map(str, groups)))
    engine, NotedDrafts.notes = make_engine(model, byte_tokenizer, 3, **options), {}
    engine.steps_class = NotedDrafts
    accepted = Counter()
    for found, prompt in zip(answers(engine, make_requests(prompts)), prompts, strict=True):
        run = dict(max_new_tokens=30, stop_ids=engine.stop_ids)
        plain = decode_verified(model, prompt, **run, draft_length=draft_length, groups=groups)
        assert found.tokens == plain.tokens and found.accepted_drafts == sum(plain.accepted)
        assert NotedDrafts.notes[tuple(prompt)] == plain.drafts
        accepted.update(plain.accepted)
    assert len(accepted) > 3  # several lengths


@pytest.fixture(scope="module")
def told(byte_tokenizer):
    """A model, prompts, and greedy answers that GivenDrafts knows."""
    model, prompts = make_model(context="causal"), make_prompts((1, 5, 7, 8, 9, 16, 21, 3, 12))
    expected = answers(make_engine(model, byte_tokenizer, 9, mode="ar"), make_requests(prompts))
    GivenDrafts.truth = {tuple(prompt): one.tokens for prompt, one in zip(prompts, expected, strict=True)}
    return model, prompts, expected


def told_engine(told, tokenizer, batch_size=4, **options):
    engine = make_engine(told[0], tokenizer, batch_size, **options)
    engine.steps_class = GivenDrafts
    return engine


@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize(("draft_length", "groups"), [(1, "all"), (5, "all"), (16, "0,16"), (8, "0")])
def test_drafts_of_any_quality_change_nothing_and_right_ones_save_passes(
    byte_tokenizer, told, batch_size, draft_length, groups
):
    _, prompts, expected = told
    engine = told_engine(told, byte_tokenizer, batch_size, draft_length=draft_length, draft_groups=groups)
    found = answers(engine, make_requests(prompts))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.tokens, ours.text) == (theirs.tokens, theirs.text)
        assert ours.counted_tokens <= ours.computed_tokens == ours.denoise_passes + ours.accepted_drafts
        assert ours.accepted_drafts <= ours.checked_drafts
    passes = sum(one.denoise_passes for one in found)
    assert passes < 0.75 * sum(one.denoise_passes for one in expected)


def test_stop_strings_and_limits_inside_accepted_drafts_cut_where_token_by_token_does(byte_tokenizer, told):
    model, prompts, expected = told
    requests, num_cut = [], 0
    for prompt, one in zip(prompts, expected, strict=True):  # two letters each: half a character is no text yet
        pairs = [one.text[i : i + 2] for i in range(1, len(one.text)) if one.text[i : i + 2].isascii()]
        requests.append(Request(prompt=prompt, max_new_tokens=30, stop_strings=tuple(pairs[:1])))
    theirs = answers(make_engine(model, byte_tokenizer, mode="ar"), requests)
    for draft_length in (2, 6):
        ours = answers(told_engine(told, byte_tokenizer, draft_length=draft_length), requests)
        assert [one.text for one in ours] == [one.text for one in theirs]
        num_cut += sum(len(one.text) < len(whole.text) for one, whole in zip(ours, expected, strict=True))
    assert num_cut > 8
    for most in (1, 2, 5, 9):
        ours = answers(told_engine(told, byte_tokenizer, draft_length=6), make_requests(prompts, most=most))
        assert [one.tokens for one in ours] == [one.tokens[:most] for one in expected]


def test_a_stream_shows_verified_tokens_alone(byte_tokenizer, told):
    _, prompts, expected = told
    sizes = Counter()
    for prompt, one in zip(prompts, expected, strict=True):
        engine, shown = told_engine(told, byte_tokenizer, draft_length=5), []
        for piece in engine.stream(make_requests([prompt])[0]):
            shown += piece
            sizes[len(piece)] += 1
            assert shown == one.tokens[: len(shown)]
            row = engine.state.tokens[0, len(prompt) + len(shown) :]
            assert bool((row == MASK).all()) or one.tokens[len(shown) - 1] in STOP  # nothing else is written yet
        assert shown == one.tokens
    assert max(sizes) > 3  # several at once


class PoisonedVerify(GivenDrafts):
    """Steps that spoil, before each pass, all keys and values that no row may see before they are written anew."""

    def verify(self, slots, plan):
        at = self.state.take(slots)
        for slot, start in zip(slots.tolist(), at.start.tolist(), strict=True):
            for slab in (self.cache.keys, self.cache.values):
                slab[:, slot, :, start:] = 1e4
        super().verify(slots, plan)


def test_no_row_sees_a_rejected_draft_or_a_scratch_place_of_an_earlier_pass(byte_tokenizer, told):
    _, prompts, expected = told
    engine = told_engine(told, byte_tokenizer, draft_length=4, draft_groups="0,2,4")
    engine.steps_class = PoisonedVerify
    found = answers(engine, make_requests(prompts))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert sum(one.accepted_drafts < one.checked_drafts for one in found) > 3  # there were rejected ones


@pytest.mark.parametrize("lag", [0, 1])
def test_a_host_that_lags_behind_changes_nothing(byte_tokenizer, told, monkeypatch, lag):
    _, prompts, expected = told
    set_up = Engine._set_up

    def set_up_with_lag(engine, waiting):
        set_up(engine, waiting)
        engine._lag = lag

    monkeypatch.setattr(Engine, "_set_up", set_up_with_lag)
    found = answers(told_engine(told, byte_tokenizer, 3, draft_length=12), make_requests(prompts))
    assert [one.tokens for one in found] == [one.tokens for one in expected]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_batch_equals_batches_of_one(byte_tokenizer, options):
    model, requests = make_model(context="causal"), make_requests(make_prompts(LENGTHS))
    together = answers(make_engine(model, byte_tokenizer, 5, draft_length=3, **options), requests)
    for request, batched in zip(requests, together, strict=True):
        (alone,) = make_engine(model, byte_tokenizer, 1, draft_length=3, **options).run([request])
        assert replace(batched, index=0) == alone


@pytest.mark.parametrize("options", [{"temperature": 1.3}, {"temperature": 0.6, "top_p": 0.8}])
def test_drawn_answers_are_those_of_mode_ar_with_the_same_seeds(byte_tokenizer, options):
    model, requests = make_model(context="causal"), make_requests(make_prompts(LENGTHS))
    expected = answers(make_engine(model, byte_tokenizer, mode="ar", **options), requests)
    found = answers(make_engine(model, byte_tokenizer, draft_length=5, **options), requests)
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_drawn_answers_have_the_distribution_of_token_by_token(byte_tokenizer):
    """Chi-square over all answers of three tokens, the second of which is drafted; 4 tokens can be drawn."""
    vocabulary, count = 5, 3000
    qwen = make_qwen(3, vocab_size=vocabulary, initializer_range=0.5)
    model = BlockDiffusionLM(qwen, block_size=8, mask_token_id=vocabulary - 1, context_attention="causal")
    prompt, temperature = [1, 2, 0], 1.5
    engine = make_engine(model, byte_tokenizer, 1000, draft_length=2, temperature=temperature, top_p=1.0)
    found = list(engine.run([Request(prompt=prompt, max_new_tokens=3, seed=seed) for seed in range(count)]))
    drawn = Counter(tuple(one.tokens) for one in found)
    accepted = sum(one.accepted_drafts for one in found)
    assert 0.1 * count < accepted < 0.9 * count and sum(one.checked_drafts for one in found) == count

    def next_tokens(tokens):
        with torch.no_grad():
            return (causal_logits(model, prompt + tokens)[-1] / temperature).softmax(-1).tolist()

    expected = {
        (a, b, c): count * next_tokens([])[a] * next_tokens([a])[b] * next_tokens([a, b])[c]
        for a, b, c in product(range(vocabulary - 1), repeat=3)
    }
    assert sum(expected.values()) == pytest.approx(count, rel=1e-4)
    rare = [answer for answer, number in expected.items() if number < 5]  # one class
    classes = [(drawn[answer], number) for answer, number in expected.items() if number >= 5]
    classes += [(sum(drawn[answer] for answer in rare), sum(expected[answer] for answer in rare))] if rare else []
    statistic = sum((seen - number) ** 2 / number for seen, number in classes)
    freedom = len(classes) - 1
    # mean and variance of chi-square are its degrees of freedom and twice that; 3.1 deviations are about p = 0.001
    assert freedom > 20 and statistic < freedom + 3.1 * (2 * freedom) ** 0.5
    # a sampler that accepts every draft would be far off
    greedy = {**drawn, max(expected, key=expected.get): count // 4}
    assert sum((greedy.get(answer, 0) - number) ** 2 / number for answer, number in expected.items()) > 3 * freedom


def test_the_fused_forward_pass_gives_the_same_answers_in_the_same_passes(byte_tokenizer, told):
    _, prompts, expected = told
    plain = answers(told_engine(told, byte_tokenizer, draft_length=4, draft_groups="0,1,4"), make_requests(prompts))
    engine = told_engine(told, byte_tokenizer, draft_length=4, draft_groups="0,1,4", engine={"is_fused": True})
    assert answers(engine, make_requests(prompts)) == plain
    own = make_engine(told[0], byte_tokenizer, draft_length=4, engine={"is_fused": True})  # its own drafts
    assert [one.tokens for one in answers(own, make_requests(prompts))] == [one.tokens for one in expected]


def test_a_common_prefix_is_read_once_and_used_slots_start_anew(byte_tokenizer):
    model, (prefix, *rest) = make_model(context="causal"), make_prompts((24, 1, 5, 8, 40))
    requests = make_requests([prefix + tail for tail in rest] + [prefix])
    expected = answers(make_engine(model, byte_tokenizer, mode="ar"), requests)
    engine = make_engine(model, byte_tokenizer, 2, draft_length=3)
    for _ in range(2):  # the second run finds the drafts of the first in its slots
        found = answers(engine, requests)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
    (alone,) = make_engine(model, byte_tokenizer, draft_length=3).run(requests[:1])
    assert found[0].layers_run <= alone.layers_run


def test_what_cannot_be_verified_or_would_do_nothing_is_refused(byte_tokenizer):
    causal, block = make_model(context="causal"), make_model()
    with pytest.raises(ValueError, match="context attends causally, got context_attention block"):
        make_engine(block, byte_tokenizer)
    with pytest.raises(ValueError, match="verified does nothing in mode ar"):
        Engine(causal, byte_tokenizer, mode="ar", decode=DecodeConfig(policy="verified"))
    for reuse in (ReuseConfig(reuse_k=2), ReuseConfig(active_rows="needed")):
        with pytest.raises(ValueError, match="reuse .* does nothing in decode.policy verified"):
            make_engine(causal, byte_tokenizer, engine={"reuse": reuse})
    with pytest.raises(ValueError, match="policy verified has no parameter, got 0.5"):
        next(make_engine(causal, byte_tokenizer).run(make_requests([[1]], parameter=0.5)))
    for options, message in {
        (("draft_length", 65),): "draft_length must be 1 to 64, or 0 to have it chosen, got 65",
        (("draft_length", -1),): "draft_length must be 1 to 64",
        (("draft_groups", "1,2"),): "from 0 to draft_length .7., got '1,2'",
        (("draft_groups", "0,9"),): "got '0,9'; try 0,7",
        (("draft_groups", "0,3,2"),): "ascending",
        (("draft_groups", "0,x"),): "got '0,x'",
        (("draft_length", 0), ("draft_groups", "0,4")): "needs a draft_length",
        (("fuse_append", True),): "fuse_append does nothing in policy verified",
        (("threshold", 0.8),): "decode.threshold does nothing in policy verified",
        (("policy_parameter", 0.8),): "policy verified has no parameter",
        (("policy", "threshold"), ("draft_length", 4)): "draft_length does nothing in policy threshold, got 4",
        (("policy", "fixed"), ("draft_groups", "0")): "draft_groups does nothing in policy fixed",
    }.items():
        with pytest.raises(ValueError, match=message):
            DecodeConfig(**{"policy": "verified", **dict(options)})


class AtMaskRows(torch.nn.Linear):
    """A linear layer with an update that acts on mask rows alone, as a gated adapter's does."""

    def forward(self, rows):
        output = super().forward(rows)
        return torch.where(self.is_masked[..., None], 3 * output.flip(-1), output)


def test_what_acts_on_mask_rows_alone_changes_drafts_and_no_answer(byte_tokenizer, told, monkeypatch):
    _, prompts, expected = told
    model = make_model(context="causal")
    for layer in model.qwen.model.layers:
        layer.mlp.down_proj.__class__ = layer.self_attn.v_proj.__class__ = AtMaskRows
    embed = model.embed

    def embed_and_gate(tokens, positions):
        AtMaskRows.is_masked = tokens == MASK
        return embed(tokens, positions)

    monkeypatch.setattr(model, "embed", embed_and_gate)
    engine = make_engine(model, byte_tokenizer, 3, draft_length=5)
    found = answers(engine, make_requests(prompts))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    drafts = []
    for each in (model, told[0]):
        with torch.no_grad():
            drafts.append(draft_logits(each, [*prompts[4], 1, 2], len(prompts[4]) - 1, [0, 2], 5)[1].argmax(-1))
    assert not torch.equal(*drafts)
