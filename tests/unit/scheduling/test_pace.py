"""Which rounds are planned, which are learned from, and which rows are asked for drafts."""

import numpy as np

from dspark_batch.scheduling.lengths import AskedRows
from dspark_batch.scheduling.standing import Cuts, Pace, StandingPlan


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
    plan = StandingPlan.of_round([100, 101, 102], [9, 9, 2], [4, 0, 2], most=4, price=0.3)
    assert plan.lengths([100, 101], [9, 9]) is None, "fewer rows are planned"
    assert plan.lengths([100, 101, 102], [9, 9, 9]) == [4, 0, 4]
    assert plan.lengths([100, 101, 102], [3, 9, 1]) == [3, 0, 1]
    assert plan.lengths([101, 102, 103], [9, 9, 9]) == [0, 4, 4], "a new row is asked as most are"
    assert plan.lengths([100, 101, 102], [0, 5, 0]) is None, "nobody may draft"
    for _ in range(3):
        assert plan.lengths([100, 101, 102], [9, 9, 9]) == [4, 0, 4]
    assert plan.lengths([100, 101, 102], [9, 9, 9]) is None, "thought over after seven rounds"
    short = StandingPlan.of_round([1, 2], [9, 9], [2, 1], most=4, price=0.3)
    assert short.lengths([2, 3], [9, 9]) == [1, 2], "where nobody was asked for all, nobody is"


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
