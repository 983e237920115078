"""How many drafts a verifying pass makes, and for which accepted lengths: given, or chosen from what is accepted.

The choice changes how long an answer takes, never what it is.
"""

from functools import cache
from typing import NamedTuple

MOST_DRAFTS = 64
# Milliseconds of a verifying pass by its rows, 1.5B with an adapter of rank 64 on an H100, context 512
# (experiments/04_lossless, revision 3618225f09): without drafts, then 3 with one and four groups, 7, 14 and 15 drafts.
# Beyond, a row costs what it does between the last two.
PASS_COSTS = ((1, 1.704), (7, 2.526), (16, 2.575), (64, 2.906), (127, 3.455), (256, 4.754))
LENGTHS = (3, 7, 15)  # with all groups 16, 64 and 256 rows, which fill the kernels' tiles
STRIDES = (1, 2, 4)  # a group for each accepted length, for every second one, ...
FIRST_RATE, FIRST_WEIGHT = 0.75, 20.0  # what is believed before any draft was checked, and how firmly, in drafts
KEPT = 0.98  # of the weight of what was seen, at each report


class DraftPlan(NamedTuple):
    """What a verifying pass drafts."""

    length: int
    """Drafts that each group makes; 0: none, token by token."""
    groups: tuple[int, ...]
    """Accepted lengths for which drafts are made, ascending from 0; none where `length` is 0."""

    @property
    def num_drafting(self) -> int:
        """Rows of a slot that hold the mask token."""
        return self.length * len(self.groups)

    @property
    def num_rows(self) -> int:
        """Rows of a slot: the newest token, the drafts to be verified, the drafting rows."""
        return 1 + self.length + self.num_drafting


PLAIN = DraftPlan(0, ())


def parse_plan(draft_length: int, draft_groups: str) -> DraftPlan | None:
    """Return the plan that the options ask for, None where it is chosen while decoding.

    Raises:
        ValueError: a length out of range, or groups that are no ascending list from 0.
    """
    if not 0 <= draft_length <= MOST_DRAFTS:
        raise ValueError(
            f"decode.draft_length must be 1 to {MOST_DRAFTS}, or 0 to have it chosen, got {draft_length}; try 7."
        )
    if draft_length == 0:
        if draft_groups != "all":
            raise ValueError(
                f"decode.draft_groups {draft_groups} needs a draft_length: with 0 both are chosen; leave one out."
            )
        return None
    if draft_groups == "all":
        return DraftPlan(draft_length, tuple(range(draft_length + 1)))
    parts = draft_groups.split(",")
    groups = tuple(int(part) for part in parts if part.isdecimal())
    is_list = len(groups) == len(parts) and list(groups) == sorted(set(groups))
    if not is_list or groups[0] != 0 or groups[-1] > draft_length:
        raise ValueError(
            f"decode.draft_groups must be all, or ascending numbers of accepted drafts from 0 to draft_length "
            f"({draft_length}), got {draft_groups!r}; try 0,{draft_length}."
        )
    return DraftPlan(draft_length, groups)


@cache
def candidate_plans() -> tuple[DraftPlan, ...]:
    """Return the plans that are chosen from: token by token, and each length with groups at each stride."""
    drafting = [DraftPlan(length, tuple(range(0, length + 1, stride))) for length in LENGTHS for stride in STRIDES]
    return (PLAIN, *drafting)


@cache
def expected_tokens(plan: DraftPlan, rate: float) -> float:
    """Return the tokens that a pass gives in the long run, if each draft behind right ones is right at `rate`.

    A chain over the number of drafts that a pass is given: all of them, or what is left of a shorter group's. Those are
    taken to be as good as others, which flatters plans with few groups.
    """
    if not plan.length:
        return 1.0
    share = [0.0] * plan.length + [1.0]  # of the passes, by the drafts that they are given
    for _ in range(2 * plan.length):
        following = [0.0] * len(share)
        for given, weight in enumerate(share):
            for accepted in range(given + 1):
                chance = rate**accepted * (1.0 if accepted == given else 1 - rate)
                nearest = max(min(length, given) for length in plan.groups if min(length, given) <= accepted)
                following[plan.length - accepted + nearest] += weight * chance
        share = following
    return sum(weight * sum(rate**i for i in range(given + 1)) for given, weight in enumerate(share))


def pass_cost(num_rows: int) -> float:
    """Return the milliseconds of a pass over so many rows, by PASS_COSTS: straight lines between its points."""
    pairs = list(zip(PASS_COSTS, PASS_COSTS[1:], strict=False))
    (low, start), (high, end) = next((pair for pair in pairs if num_rows <= pair[1][0]), pairs[-1])
    return start + (end - start) * (num_rows - low) / (high - low)


@cache
def choose_plan(rate: float, num_slots: int) -> DraftPlan:
    """Return the candidate that gives the most tokens in a second for so many slots; of equals the one of fewer rows.

    Token by token where drafts are seldom right, or where there are so many slots that rows cost too much.
    """

    def speed(plan: DraftPlan) -> tuple[float, int]:
        return expected_tokens(plan, rate) / pass_cost(num_slots * plan.num_rows), -plan.num_rows

    return max(candidate_plans(), key=speed)


class DraftChooser:
    """Owns the running acceptance rate, and says what the next pass drafts."""

    def __init__(self, plan: DraftPlan | None):
        self.fixed = plan
        self.plans = candidate_plans() if plan is None else (plan,)
        self._checked, self._accepted = FIRST_WEIGHT, FIRST_WEIGHT * FIRST_RATE

    @property
    def rate(self) -> float:
        """The share of checked drafts that were accepted, of late."""
        return self._accepted / self._checked

    def note(self, checked: int, accepted: int) -> None:
        """Take in how many drafts were checked since the last report, and accepted."""
        if checked:
            self._checked, self._accepted = self._checked * KEPT + checked, self._accepted * KEPT + accepted

    def plan(self, num_slots: int) -> DraftPlan:
        """Return the plan for a pass over so many slots."""
        return self.fixed or choose_plan(round(self.rate, 2), num_slots)
