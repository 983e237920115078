"""How much is drafted: expected tokens against simulated ones, and what is chosen."""

import json
import random
from pathlib import Path

import pytest

from decoding.test_engine import make_model, make_prompts
from decoding.test_verify import answers, make_engine, make_requests
from fastdllm.decoding.drafts import (
    PASS_COSTS,
    PLAIN,
    DraftChooser,
    DraftPlan,
    candidate_plans,
    choose_plan,
    expected_tokens,
    parse_plan,
    pass_cost,
)

ROWS = Path(__file__).parents[2] / "experiments/04_lossless/rows/passes"


@pytest.mark.parametrize("rate", [0.3, 0.8, 1.0])
def test_with_a_group_for_each_length_a_pass_gives_the_sum_of_a_geometric_series(rate):
    plan = parse_plan(6, "all")
    assert expected_tokens(plan, rate) == pytest.approx(sum(rate**i for i in range(7)))
    assert expected_tokens(PLAIN, rate) == 1.0


@pytest.mark.parametrize("groups", [(0,), (0, 4), (0, 2, 5)])
@pytest.mark.parametrize("rate", [0.4, 0.9])
def test_with_fewer_groups_a_pass_gives_what_a_simulation_does(groups, rate):
    plan, draw = DraftPlan(5, groups), random.Random(0)
    given, tokens, passes = 5, 0, 20000
    for _ in range(passes):
        accepted = 0
        while accepted < given and draw.random() < rate:
            accepted += 1
        tokens += accepted + 1
        given = 5 - accepted + max(min(length, given) for length in groups if min(length, given) <= accepted)
    assert expected_tokens(plan, rate) == pytest.approx(tokens / passes, rel=0.03)


def test_costs_pass_through_what_was_measured_and_go_on_as_a_line():
    assert [pass_cost(rows) for rows in (1, 64, 256)] == pytest.approx([1.704, 2.906, 4.754])
    assert pass_cost(385) == pytest.approx(6.053)  # 129 rows more cost what the 129 before them do


def test_costs_are_those_of_the_committed_rows():
    for rows, cost in PASS_COSTS:
        row = json.loads((ROWS / f"qwen2.5-1.5b-verify-{rows}x1-c512.json").read_text())
        assert row["ms_per_forward"] == pytest.approx(cost, abs=0.0006) and pass_cost(rows) == cost


def test_drafts_are_made_where_they_pay_and_fewer_for_more_slots():
    assert choose_plan(0.0, 1) == choose_plan(0.9, 1000) == PLAIN
    chosen = [choose_plan(0.9, slots) for slots in (1, 8, 64, 512)]
    rows = [plan.num_rows for plan in chosen]
    assert rows == sorted(rows, reverse=True) and rows[0] > 1 == rows[-1]
    assert choose_plan(0.95, 1).length >= choose_plan(0.5, 1).length > 0
    for rate, slots in ((0.3, 1), (0.8, 4), (0.8, 32)):
        best = choose_plan(rate, slots)
        speeds = [expected_tokens(plan, rate) / pass_cost(slots * plan.num_rows) for plan in candidate_plans()]
        assert expected_tokens(best, rate) / pass_cost(slots * best.num_rows) == max(speeds)


def test_the_running_rate_follows_what_is_accepted():
    chooser = DraftChooser(None)
    before = chooser.plan(1)
    for _ in range(300):
        chooser.note(8, 0)
    assert chooser.rate < 0.01 and before.length > 0 and chooser.plan(1) == PLAIN
    chooser.note(0, 0)  # a pass without drafts tells nothing
    assert chooser.rate < 0.01
    for _ in range(300):
        chooser.note(8, 8)
    assert chooser.rate > 0.99 and chooser.plan(1).length == max(plan.length for plan in candidate_plans())
    assert DraftChooser(parse_plan(3, "0")).plan(100) == DraftPlan(3, (0,))


def test_an_engine_that_chooses_gives_the_same_answers_and_stops_drafting_in_vain(byte_tokenizer):
    model, requests = make_model(context="causal"), make_requests(make_prompts((1, 9, 16)), most=24)
    expected = answers(make_engine(model, byte_tokenizer, mode="ar"), requests)
    engine = make_engine(model, byte_tokenizer, 2, draft_length=0)
    found = answers(engine, requests)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert engine._drafts.rate < 0.6  # random weights draft badly
    assert engine.steps.drafts.shape[1] == max(plan.length for plan in candidate_plans())
