"""Which rounds are planned, which are learned from, and which rows are asked for drafts."""

from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.scheduling.cost import Seen
from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.lengths import AskedRows
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.standing import FullDrafts, Pace, PlainRounds, StandingPlan, StandingPlans


def load_of(handles: Sequence[int], limits: Sequence[int], *, num_prefill_tokens: int = 0) -> RoundLoad:
    return RoundLoad(handles=handles, limits=limits, num_prefill_tokens=num_prefill_tokens, num_queued=0)


def plan_of(handles: Sequence[int], limits: Sequence[int], asked: Sequence[int], *, most: int = 4) -> StandingPlan:
    return StandingPlan.of_round(load_of(handles, limits), asked, most=most, price=0.3, plain_s=0.01)


def outcome(accepted: Sequence[int], *, step_s: float, num_prefill_tokens: int = 0) -> RoundOutcome:
    verified = [4] * len(accepted)
    return RoundOutcome(verified, accepted, 5 * len(accepted) + num_prefill_tokens, num_prefill_tokens, 0.002, step_s)


def test_every_round_is_a_lesson_while_little_is_known_and_one_in_four_later() -> None:
    pace = Pace()
    assert all(pace.is_lesson(is_young=True) for _ in range(10))
    assert sum(pace.is_lesson(is_young=False) for _ in range(400)) == 100


def test_rounds_that_are_no_lessons_count_as_rounds() -> None:
    pace = Pace()
    assert pace.is_lesson(is_young=True)
    for _ in range(3):
        pace.skip()
    assert pace.is_lesson(is_young=False)


def test_a_plan_asks_the_same_rows_for_a_few_rounds() -> None:
    plan = plan_of([100, 101, 102, 103], [9, 9, 9, 2], [4, 0, 4, 2])

    def asked(handles: Sequence[int], limits: Sequence[int]) -> list[int] | None:
        return plan.asked if plan.keeps(load_of(handles, limits)) else None

    assert asked([100, 101], [9, 9]) is None, "half as many rows are planned for"
    assert asked([100, 101, 102, 103, 104], [9] * 5) is None, "as are more"
    assert asked([100, 101, 102, 103], [9, 9, 9, 9]) == [4, 0, 4, 4]
    assert asked([100, 101, 102, 103], [3, 9, 0, 1]) == [3, 0, 0, 1]
    assert asked([101, 102, 103, 104], [9, 9, 9, 9]) == [0, 4, 4, 4], "a new row is asked as most are"
    assert asked([100, 101, 102], [9, 9, 9]) == [4, 0, 4], "one has left"
    assert asked([100, 101, 102], [0, 5, 0]) is None, "nobody may draft"
    for _ in range(2):
        assert asked([100, 101, 102], [9, 9, 9]) == [4, 0, 4]
    assert asked([100, 101, 102], [9, 9, 9]) is None, "thought over after seven rounds"


def test_where_nobody_is_asked_for_a_whole_draft_new_rows_are_not_either() -> None:
    short = plan_of([1, 2, 3], [9, 9, 2], [2, 1, 2], most=7)
    assert short.keeps(load_of([2, 3, 4], [9, 9, 9]))
    assert short.asked == [1, 2, 2]


@pytest.mark.parametrize(
    ("saving", "num_rounds", "num_prefill_tokens", "worth", "found"),
    [
        (0.1, 2, 0, None, 4),
        (0.1, 100, 0, None, 7),
        (0.2, 100, 0, None, 7),
        (0.3, 3, 0, None, 6),
        (0.3, 100, 0, None, 31),
        (0.3, 100, 50, None, 7),
        (0.3, 100, 0, {1: 1.0}, 7),
    ],
)
def test_plans_stand_longer_where_drafting_clearly_pays_and_as_far_as_that_is_known(
    saving: float, num_rounds: int, num_prefill_tokens: int, worth: dict[int, float] | None, found: int
) -> None:
    plans, gate = StandingPlans(), Gate(is_open=True, saved=saving, num_rounds=num_rounds)
    load, plan = load_of([1], [90], num_prefill_tokens=num_prefill_tokens), plan_of([1], [90], [4])
    plan.worth = worth
    plans.put("kind", gate, load, plan)
    count = 0
    while plans.find("kind", gate, load) is not None:
        count += 1
    assert count == found


def test_plans_of_one_kind_end_with_its_gate_and_tell_it_what_they_saved() -> None:
    plans, gate = StandingPlans(), Gate(is_open=True, num_rounds=3)
    plain, with_prompts = load_of([1], [90]), load_of([1], [90], num_prefill_tokens=9)
    for load in (plain, with_prompts):
        plans.put("kind", gate, load, plan_of([1], [90], [4]))
    assert plans.find("other", gate, plain) is None
    assert plans.find("kind", gate, with_prompts) is not plans.find("kind", gate, plain) is not None
    for _ in range(5):
        plan = plans.find("kind", gate, plain)
        assert plan is not None
        plan.note(plain, outcome([2], step_s=0.013))
    assert plans.find("kind", gate, plain) is None
    assert (gate.num_rounds, gate.balance) == (4, pytest.approx(5 * 1.5))
    gate.close()
    assert plans.find("kind", gate, with_prompts) is None
    gate.is_open = True
    assert plans.find("kind", gate, with_prompts) is None, "it does not come back with the gate"


def test_a_plan_sums_what_its_rounds_save_but_not_those_with_prompts_and_bounds_hiccups() -> None:
    plan = plan_of([1, 2], [90, 90], [4, 4])
    plan.note(load_of([1, 2], [90, 90]), outcome([2, 1], step_s=0.013))
    assert plan.saved == pytest.approx(1.5 - 0.5)
    plan.note(load_of([1, 2], [90, 90]), outcome([4, 4], step_s=0.5, num_prefill_tokens=100))
    assert (plan.num_seen, plan.saved) == (1, pytest.approx(1.0))
    plan.note(load_of([1, 2], [90, 90]), outcome([0, 0], step_s=9.0))
    assert (plan.num_seen, plan.saved) == (2, pytest.approx(1.0 - 3.0))
    plan.note(load_of([1], [90]), outcome([4], step_s=0.001))
    assert plan.num_seen == 2, "fewer rows have a cheaper plain step"


def test_a_plan_weighs_rows_by_what_their_tokens_are_worth() -> None:
    load = load_of([1, 2], [90, 9])
    worth = np.array([1.5, 0.5])
    plan = StandingPlan.of_round(load, [4, 4], most=4, price=0.3, plain_s=0.01, worth=worth)
    assert plan.prices([1, 2, 3]) == pytest.approx([0.2, 0.6, 0.3]), "a new row is worth the mean"
    plan.note(load, outcome([2, 1], step_s=0.008))
    assert plan.saved == pytest.approx((2 * 1.5 + 1 * 0.5) / 2)
    assert plan_of([1, 2], [9, 9], [4, 4]).prices([1, 2]) == [0.3, 0.3]


def drafted(plain: PlainRounds, count: int = 1, *, num_step_tokens: int = 20) -> None:
    for _ in range(count):
        plain.count(4, num_step_tokens=num_step_tokens, is_drafted=True)


def test_plain_rounds_come_now_and_then_and_soon_where_their_cost_is_in_doubt() -> None:
    def rounds_until_due(*, saved: float = 0.1, seen: Seen = Seen.AS_EXPECTED) -> int:
        plain, gate = PlainRounds(), Gate(is_open=True, saved=saved, num_rounds=100)
        plain.count(4, num_step_tokens=4, is_drafted=False)
        while not plain.is_due(gate, 4, seen=seen):
            drafted(plain)
        return plain.num_rounds - 1

    assert (rounds_until_due(), rounds_until_due(saved=0.5), rounds_until_due(seen=Seen.NEVER)) == (64, 512, 8)


def test_a_plain_round_begins_the_count_anew() -> None:
    plain, gate = PlainRounds(), Gate(is_open=True)
    drafted(plain, 7)
    plain.count(4, num_step_tokens=4, is_drafted=False)
    drafted(plain, 7)
    assert not plain.is_due(gate, 4, seen=Seen.DIFFERENT)
    drafted(plain)
    assert plain.is_due(gate, 4, seen=Seen.DIFFERENT)


def test_a_draft_that_is_cut_shows_a_plain_step_unless_prompts_share_it() -> None:
    plain, gate = PlainRounds(), Gate(is_open=True)
    drafted(plain, 8)
    drafted(plain, num_step_tokens=100)
    assert plain.is_due(gate, 4, seen=Seen.DIFFERENT)
    drafted(plain, 8)
    drafted(plain, num_step_tokens=4)
    assert not plain.is_due(gate, 4, seen=Seen.DIFFERENT)


def test_one_cut_in_sixteen_is_not_made_unless_it_surely_gains_much() -> None:
    def due(gain: float, seen: Seen) -> list[bool]:
        full = FullDrafts()
        return [full.are_due(gain, seen=seen) for _ in range(32)]

    one_in_sixteen = [False] * 15 + [True] + [False] * 15 + [True]
    assert due(0.1, Seen.AS_EXPECTED) == due(0.1, Seen.NEVER) == due(0.4, Seen.NEVER) == one_in_sixteen
    assert not any(due(0.4, Seen.AS_EXPECTED) + due(0.0, Seen.DIFFERENT))
    assert all(due(0.4, Seen.DIFFERENT))


def test_rows_that_are_not_worth_it_are_asked_again_each_in_its_turn() -> None:
    rows = AskedRows()
    handles = list(range(5))
    asked = sum(rows.choose(handles, np.zeros(5, bool)).astype(int) for _ in range(64))
    assert np.asarray(asked).tolist() == [2] * 5
