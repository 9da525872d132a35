"""Which rounds are planned, which are learned from, and which rows are asked for drafts."""

from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.scheduling.lengths import AskedRows
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.standing import Cuts, Pace, StandingPlan


def plan_of(
    handles: Sequence[int], limits: Sequence[int], asked: Sequence[int], *, saving: float = 0.1
) -> StandingPlan:
    load = RoundLoad(handles=handles, limits=limits, num_prefill_tokens=0, num_queued=0)
    return StandingPlan.of_round(load, asked, most=4, price=0.3, plain_s=0.01, saving=saving)


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


def test_a_plan_stands_for_seven_rounds_of_as_many_rows() -> None:
    plan = plan_of([100, 101, 102], [9, 9, 2], [4, 0, 2])
    assert plan.lengths([100, 101], [9, 9]) is None, "fewer rows are planned"
    assert plan.lengths([100, 101, 102], [9, 9, 9]) == [4, 0, 4]
    assert plan.lengths([100, 101, 102], [3, 9, 1]) == [3, 0, 1]
    assert plan.lengths([101, 102, 103], [9, 9, 9]) == [0, 4, 4], "a new row is asked as most are"
    assert plan.lengths([100, 101, 102], [0, 5, 0]) is None, "nobody may draft"
    for _ in range(3):
        assert plan.lengths([100, 101, 102], [9, 9, 9]) == [4, 0, 4]
    assert plan.lengths([100, 101, 102], [9, 9, 9]) is None, "thought over after seven rounds"
    short = plan_of([1, 2], [9, 9], [2, 1])
    assert short.lengths([2, 3], [9, 9]) == [1, 2], "where nobody was asked for all, nobody is"


@pytest.mark.parametrize(("saving", "num_rounds"), [(0.1, 7), (0.2, 7), (0.3, 31)])
def test_a_plan_stands_longer_where_drafting_clearly_pays(saving: float, num_rounds: int) -> None:
    plan = plan_of([1], [90], [4], saving=saving)
    while plan.lengths([1], [90]) is not None:
        num_rounds -= 1
    assert num_rounds == 0


def test_a_plan_sums_what_its_rounds_save_but_not_those_with_prompts_and_bounds_hiccups() -> None:
    plan = plan_of([1, 2], [90, 90], [4, 4])
    plan.note(outcome([2, 1], step_s=0.013))
    assert plan.saved == pytest.approx(1.5 - 0.5)
    plan.note(outcome([4, 4], step_s=0.5, num_prefill_tokens=100))
    assert (plan.num_seen, plan.saved) == (1, pytest.approx(1.0))
    plan.note(outcome([0, 0], step_s=9.0))
    assert (plan.num_seen, plan.saved) == (2, pytest.approx(1.0 - 3.0))


def test_cuts_pay_by_what_they_gain_over_the_rounds_of_about_as_many_rows() -> None:
    cuts = Cuts()
    for _ in range(50):
        found = [cuts.pay(4, gain) for gain in (0.0, 0.2)]
        assert not cuts.pay(1, 0.01)
    assert found == [True, True], "0.1 on average"
    assert not cuts.pay(1, 0.5), "once is not enough"


def test_one_cut_in_four_is_not_made_unless_it_gains_much() -> None:
    cuts = Cuts()
    assert [cuts.is_due_in_full(0.1) for _ in range(8)] == [False, False, False, True] * 2
    assert not any(cuts.is_due_in_full(gain) for gain in (0.0, 0.4) for _ in range(8))


def test_rows_that_are_not_worth_it_are_asked_again_each_in_its_turn() -> None:
    rows = AskedRows()
    handles = list(range(5))
    asked = sum(rows.choose(handles, np.zeros(5, bool)).astype(int) for _ in range(64))
    assert np.asarray(asked).tolist() == [2] * 5
