"""Proposals and acceptance, worked out by hand."""

import torch
from torch.testing import assert_close

from fastdllm.decoding.policies import accept_by_threshold, propose


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
