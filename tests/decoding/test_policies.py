"""Proposals and acceptance: worked out by hand, and every policy against a loop over sorted candidates."""

import math
import re
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from fastdllm.decoding.policies import (
    POLICIES,
    VERIFIED,
    PolicyName,
    Proposals,
    accept_by_threshold,
    check_parameter,
    make_proposals,
    propose,
    resolve_parameter,
)


def test_greedy_confidence_is_the_probability_of_the_most_likely_token():
    token, confidence = propose(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]).log())
    assert token.tolist() == [1, 0]
    assert_close(confidence, torch.tensor([0.6, 0.5]))


def test_sampling_draws_from_the_renormalised_nucleus():
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log().expand(5, -1)
    # top_p 0.7: the first two (0.5, 0.3) exceed it; renormalised 0.625 and 0.375
    uniform = torch.tensor([0.0, 0.6, 0.63, 0.99, 0.9999999])
    token, confidence = propose(logits, temperature=1.0, top_p=0.7, uniform=uniform)
    assert token.tolist() == [0, 0, 2, 2, 2]
    assert_close(confidence, torch.tensor([0.625, 0.625, 0.375, 0.375, 0.375]))
    token, confidence = propose(logits, temperature=1.0, top_p=0.1, uniform=uniform)
    assert token.tolist() == [0] * 5 and confidence.tolist() == [1.0] * 5


def test_sampling_from_everything_finds_the_place_of_the_draw_and_never_what_has_no_probability():
    logits = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 0.7999, 0.8001, 1 - 2**-24])
    token, confidence = propose(logits, temperature=1.0, top_p=1.0, uniform=uniform)
    assert token.tolist() == [1, 1, 3, 3, 4, 4]
    assert_close(confidence, torch.tensor([0.5, 0.5, 0.3, 0.3, 0.2, 0.2]))
    wide = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(4000) + 0.5) / 4000
    token, _ = propose(wide.expand(4000, -1), temperature=1.0, top_p=1.0, uniform=uniform)
    expected = wide[0].softmax(-1)[:10_000].sum()
    assert abs((token < 10_000).float().mean() - expected) < 1e-3


def test_the_temperature_sharpens_before_the_nucleus_is_cut():
    logits = torch.tensor([[0.8, 0.2]]).log()
    _, confidence = propose(logits, temperature=0.5, top_p=1.0, uniform=torch.tensor([0.0]))
    assert_close(confidence, torch.tensor([0.64 / 0.68]))


def test_the_best_candidate_is_always_accepted_and_others_strictly_above_the_threshold():
    confidence = torch.tensor([[0.9, 0.95, 0.2], [0.1, 0.3, 0.99], [0.99, 0.99, 0.99]])
    is_candidate = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    accepted = accept_by_threshold(confidence, is_candidate, 0.9)
    assert accepted.tolist() == [[False, True, False], [False, True, False], [False, False, False]]
    assert accept_by_threshold(confidence[:1], is_candidate[:1], 0.85).tolist() == [[True, True, False]]
    assert accept_by_threshold(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0).sum() == 1


class Slow:
    """Every rule once more, as a loop over one row of floats; returns the accepted places."""

    def __init__(self, confidence, margin, entropy, is_candidate):
        places = [place for place, candidate in enumerate(is_candidate) if candidate]
        self.confidence = self.order(places, confidence)
        self.margin = self.order(places, margin)
        self.entropy = self.order(places, [-value for value in entropy])

    @staticmethod
    def order(places, score):
        """[(score, place)], best first, the earlier place first among equals."""
        return [(score[place], place) for place in sorted(places, key=lambda place: (-score[place], place))]

    def above(self, ordered, bound):
        return {place for rank, (score, place) in enumerate(ordered) if rank == 0 or score > bound}

    def longest(self, is_allowed):
        """The largest n that the rule allows; at least one where there is one."""
        errors = [1 - score for score, _ in self.confidence]
        allowed = [n for n in range(1, len(errors) + 1) if n == 1 or is_allowed(errors[:n])]
        return {place for _, place in self.confidence[: max(allowed, default=0)]}

    def threshold(self, parameter):
        return self.above(self.confidence, parameter)

    def factor(self, parameter):
        return self.longest(lambda errors: (len(errors) + 1) * errors[-1] < parameter)

    def profile(self, parameter):
        return self.longest(lambda errors: sum(errors) + errors[-1] < parameter)

    def entropy_(self, parameter):
        return self.above(self.entropy, -parameter)

    def margin_(self, parameter):
        return self.above(self.margin, parameter)

    def fixed(self, parameter):
        return self.longest(lambda errors: len(errors) <= round(parameter))

    def accept(self, name, parameter):
        return getattr(self, name if hasattr(type(self), name) else f"{name}_")(parameter)


PARAMETERS = {
    "threshold": (0.0625, 0.5, 0.9, 0.9375, 1.0),
    "factor": (0.125, 0.5, 0.75, 1.0, 2.0, 100.0),
    "profile": (0.125, 0.5, 0.75, 1.0, 2.0, 100.0),
    "entropy": (0.01, 0.4, 0.5, 3.0),
    "margin": (0.0625, 0.5, 0.8, 1.0),
    "fixed": (0.25, 1.0, 2.0, 2.75, 100.0),
}


def make_random(kind, seed, B=64, S=8):
    """Random proposals and candidates; `coarse` values are multiples of 1/16, so that ties and equalities abound."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, B, S, generator=generator)
    if kind == "coarse":
        values = (values * 16).round() / 16
    elif kind == "confident":
        values = 1 - (values * 4).round() / 64
    confidence, margin, entropy = values
    is_candidate = torch.rand(B, S, generator=generator) < torch.rand(B, 1, generator=generator)
    is_candidate[0], is_candidate[1] = False, True
    is_candidate[2], is_candidate[3] = torch.arange(S) == S - 1, torch.arange(S) == 0
    return Proposals(torch.zeros(B, S, dtype=torch.int64), confidence, margin, entropy * 2), is_candidate


@pytest.mark.parametrize("kind", ["fine", "coarse", "confident"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_equals_a_loop_over_the_sorted_candidates_with_a_parameter_for_each_row(name, kind):
    for seed in range(4):
        proposals, is_candidate = make_random(kind, seed)
        parameter = torch.tensor(PARAMETERS[name])[torch.arange(len(is_candidate)) % len(PARAMETERS[name])]
        accepted = POLICIES[name].accept(proposals, is_candidate, parameter)
        assert accepted.dtype == torch.bool
        assert not accepted[0].any() and not (accepted & ~is_candidate).any()
        assert torch.equal(accepted.any(-1), is_candidate.any(-1))
        for row in range(len(is_candidate)):
            slow = Slow(*(part[row].tolist() for part in (*proposals[1:], is_candidate)))
            assert set(accepted[row].nonzero().flatten().tolist()) == slow.accept(name, parameter[row].item())


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_does_not_depend_on_the_batch_around_it(name):
    proposals, is_candidate = make_random("fine", 9)
    parameter = torch.full([len(is_candidate)], PARAMETERS[name][1])
    together = POLICIES[name].accept(proposals, is_candidate, parameter)
    for row in range(len(is_candidate)):
        alone = Proposals(*(part[row : row + 1] for part in proposals))
        assert torch.equal(
            POLICIES[name].accept(alone, is_candidate[row : row + 1], parameter[:1]), together[row : row + 1]
        )


def accept_one(name, values, parameter, candidates=None):
    """One row in which confidence, margin and entropy all have these values."""
    values = torch.tensor([values])
    is_candidate = torch.ones_like(values, dtype=torch.bool) if candidates is None else torch.tensor([candidates])
    proposals = Proposals(torch.zeros_like(values, dtype=torch.int64), values, values, values)
    return POLICIES[name].accept(proposals, is_candidate, torch.tensor([parameter]))[0].int().tolist()


def test_among_equally_good_candidates_the_earlier_position_wins():
    for name, parameter in (("threshold", 1.0), ("factor", 0.25), ("profile", 0.25), ("margin", 1.0), ("entropy", 0.1)):
        assert accept_one(name, [0.5, 0.5, 0.5], parameter) == [1, 0, 0]
        assert accept_one(name, [0.5, 0.5, 0.5], parameter, [False, True, True]) == [0, 1, 0]
    assert accept_one("fixed", [0.5, 0.75, 0.5, 0.5], 3.0) == [1, 1, 1, 0]
    assert accept_one("fixed", [0.5, 0.75, 0.5, 0.5], 2.0, [False, True, True, True]) == [0, 1, 1, 0]


def test_the_factor_rule_takes_the_largest_n_below_the_factor():
    # sorted errors 1/16, 1/8, 1/4; (n + 1) error: 1/8, 3/8, 1
    confidence = [0.75, 0.9375, 0.875]
    assert accept_one("factor", confidence, 1.01) == [1, 1, 1]
    assert accept_one("factor", confidence, 1.0) == [0, 1, 1]  # not at equality
    assert accept_one("factor", confidence, 0.375) == [0, 1, 0]
    assert accept_one("factor", confidence, 0.01) == [0, 1, 0]  # always one


def test_the_profile_rule_counts_the_last_error_twice():
    # sorted errors 1/16, 1/8, 1/4; sums and the last once more: 1/8, 5/16, 11/16
    confidence = [0.75, 0.9375, 0.875]
    assert accept_one("profile", confidence, 0.70) == [1, 1, 1]
    assert accept_one("profile", confidence, 0.6875) == [0, 1, 1]  # not at equality
    assert accept_one("profile", confidence, 0.3125) == [0, 1, 0]
    assert accept_one("profile", [1.0, 1.0, 1.0], 0.01) == [1, 1, 1]


def test_the_profile_rule_accepts_what_the_factor_rule_does_and_more_unless_all_are_equal():
    proposals, is_candidate = make_random("confident", 3)
    parameter = torch.full([len(is_candidate)], 0.375)
    factor, profile = (POLICIES[name].accept(proposals, is_candidate, parameter) for name in ("factor", "profile"))
    assert not (factor & ~profile).any() and (profile & ~factor).any()
    for size in range(1, 20):
        equal = [0.875] * size
        assert accept_one("profile", equal, 1.0) == accept_one("factor", equal, 1.0)
        assert sum(accept_one("factor", equal, 1.0)) == min(size, 6)  # (n + 1) / 8 < 1


def test_the_entropy_rule_prefers_low_and_the_margin_rule_high_values():
    assert accept_one("entropy", [0.5, 0.25, 0.75], 0.75) == [1, 1, 0]
    assert accept_one("entropy", [0.5, 0.25, 0.75], 0.1) == [0, 1, 0]
    assert accept_one("margin", [0.5, 0.25, 0.75], 0.25) == [1, 0, 1]
    assert accept_one("margin", [0.5, 0.25, 0.75], 0.8) == [0, 0, 1]


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_the_threshold_policy_is_accept_by_threshold(threshold):
    for kind in ("fine", "coarse", "confident"):
        proposals, is_candidate = make_random(kind, 5)
        proposals.confidence[:, 1] = threshold  # exactly at it, as far as float32 goes
        expected = accept_by_threshold(proposals.confidence, is_candidate, threshold)
        parameter = torch.full([len(is_candidate)], threshold)
        assert torch.equal(POLICIES["threshold"].accept(proposals, is_candidate, parameter), expected)


def test_margins_and_entropies_are_those_of_float64_also_where_a_token_is_impossible():
    logits = torch.randn(3, 5, 1000, generator=torch.Generator().manual_seed(0)) * 4
    logits[..., 7] = -torch.inf  # the mask token
    logits[0, 0, 8:] = -torch.inf
    logits[0, 1, 9] = 1000.0  # certain
    proposals = make_proposals(logits, frozenset({"margin", "entropy"}))
    probability = logits.double().softmax(-1)
    best = probability.sort(-1, descending=True).values
    assert_close(proposals.margin, (best[..., 0] - best[..., 1]).float())
    entropy = -(probability * probability.log()).nan_to_num(0.0).sum(-1)
    assert_close(proposals.entropy, entropy.float())
    assert proposals.entropy[0, 1] == 0 and proposals.margin[0, 1] == 1
    tied = make_proposals(torch.zeros(1, 1, 4), frozenset({"margin", "entropy"}))
    assert tied.margin.item() == 0 and tied.token.item() == 0
    assert_close(tied.entropy.item(), math.log(4), atol=1e-6, rtol=0)


def test_proposals_are_those_of_propose_and_measure_only_what_is_needed():
    generator = torch.Generator().manual_seed(1)
    logits, uniform = torch.randn(2, 4, 50, generator=generator), torch.rand(2, 4, generator=generator)
    for temperature in (0.0, 0.7):
        token, confidence = propose(logits, temperature, 0.9, uniform)
        plain = make_proposals(logits, frozenset(), temperature, 0.9, uniform)
        assert torch.equal(plain.token, token) and torch.equal(plain.confidence, confidence)
        assert plain.margin is None and plain.entropy is None
        for policy in POLICIES.values():
            measured = make_proposals(logits, policy.needs, temperature, 0.9, uniform)
            assert {name for name in ("margin", "entropy") if getattr(measured, name) is not None} == policy.needs
            assert torch.equal(measured.token, token)
    sampled = make_proposals(logits, frozenset({"margin"}), 0.7, 0.9, uniform)
    assert torch.equal(sampled.margin, make_proposals(logits, frozenset({"margin"})).margin)  # of temperature 1


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_reads_a_value_on_the_host(name):
    policy, logits = POLICIES[name], torch.empty(3, 8, 50, device="meta")  # no values: reading one raises
    for temperature in (0.0, 1.0):
        proposals = make_proposals(logits, policy.needs, temperature, 0.9, torch.empty(3, 8, device="meta"))
        is_candidate = torch.empty(3, 8, dtype=torch.bool, device="meta")
        assert policy.accept(proposals, is_candidate, torch.empty(3, device="meta")).shape == (3, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", POLICIES)
def test_a_cuda_graph_of_a_policy_replays_on_new_values(name):
    policy = POLICIES[name]
    logits, is_candidate = torch.zeros(4, 8, 1000, device="cuda"), torch.ones(4, 8, dtype=torch.bool, device="cuda")
    parameter = torch.tensor(PARAMETERS[name], device="cuda")[:4]

    def unmask():
        proposals = make_proposals(logits, policy.needs)
        return proposals.token, policy.accept(proposals, is_candidate, parameter)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        unmask()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = unmask()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        logits.copy_(torch.randn(logits.shape, device="cuda", generator=generator) * 6)
        is_candidate.copy_(torch.rand(4, 8, device="cuda", generator=generator) < 0.7)
        graph.replay()
        for replayed, expected in zip(captured, unmask(), strict=True):
            assert torch.equal(replayed, expected)


def test_a_parameter_out_of_range_is_refused_with_a_way_out():
    for name, policy in POLICIES.items():
        check_parameter(name, policy.parameter_range.default)
        check_parameter(name, min(policy.parameter_range.high, torch.finfo(torch.float32).max))
        for value in (0.0, -1.0, math.nan, math.inf, 1e39):  # the last one is finite in float64 alone
            with pytest.raises(ValueError, match=f"of policy {name} must be"):
                check_parameter(name, value)
    refused = {
        (
            "threshold",
            1.5,
        ): "decode.threshold of policy threshold must be in (0, 1], got 1.5; 1.0 is one token per step.",
        ("margin", 2.0): "decode.policy_parameter of policy margin must be in (0, 1], got 2.0; try 0.8.",
        ("fixed", 1e39): "decode.policy_parameter of policy fixed must be at most 3.4e+38, got 1e+39; try 2.",
        ("factor", 0.0): "decode.policy_parameter of policy factor must be above 0, got 0.0; try 1.",
        ("fixed", 2.5): "decode.policy_parameter of policy fixed must be a whole number above 0, got 2.5; try 2.",
        ("verified", 1.0): "policy verified has no parameter, got 1.0; leave it out",
        (
            "best",
            1.0,
        ): "decode.policy must be one of threshold, factor, profile, entropy, margin, fixed, verified, got 'best'.",
    }
    for (name, value), message in refused.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            check_parameter(name, value)


def test_each_policy_reads_its_own_option_and_refuses_the_other():
    assert get_args(PolicyName) == (*POLICIES, VERIFIED)
    assert resolve_parameter(VERIFIED, 0.9, 0.0) == 0.0
    assert resolve_parameter("threshold", 0.8, 0.0) == 0.8
    assert resolve_parameter("profile", 0.9, 0.0) == 0.75
    assert resolve_parameter("profile", 0.9, 0.5) == 0.5
    with pytest.raises(ValueError, match="decode.threshold does nothing in policy profile, got 0.8"):
        resolve_parameter("profile", 0.8, 0.5)
    with pytest.raises(ValueError, match="decode.policy_parameter does nothing in policy threshold, got 0.5"):
        resolve_parameter("threshold", 0.9, 0.5)
    with pytest.raises(ValueError, match="decode.policy must be one of"):
        resolve_parameter("best", 0.9, 0.0)
