"""Which rounds are planned, which are learned from, and which rows are asked for drafts."""

from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.lengths import AskedRows
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.standing import FullDrafts, Pace, PlainRounds, StandingPlan, rounds_to_stand


def load_of(handles: Sequence[int], limits: Sequence[int]) -> RoundLoad:
    return RoundLoad(handles=handles, limits=limits, num_prefill_tokens=0, num_queued=0)


def plan_of(
    handles: Sequence[int], limits: Sequence[int], asked: Sequence[int], *, num_rounds: int = 7
) -> StandingPlan:
    load = load_of(handles, limits)
    return StandingPlan.of_round(load, asked, most=4, price=0.3, plain_s=0.01, num_rounds=num_rounds)


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


def test_a_plan_stands_for_its_rounds_of_about_as_many_rows() -> None:
    plan = plan_of([100, 101, 102, 103], [9, 9, 9, 2], [4, 0, 4, 2])
    assert plan.lengths(load_of([100, 101], [9, 9])) is None, "half as many rows are planned for"
    assert plan.lengths(load_of([100, 101, 102, 103, 104], [9] * 5)) is None, "as are more"
    assert plan.lengths(load_of([100, 101, 102, 103], [9, 9, 9, 9])) == [4, 0, 4, 4]
    assert plan.lengths(load_of([100, 101, 102, 103], [3, 9, 0, 1])) == [3, 0, 0, 1]
    assert plan.lengths(load_of([101, 102, 103, 104], [9, 9, 9, 9])) == [0, 4, 4, 4], "a new row is asked as most are"
    assert plan.lengths(load_of([100, 101, 102], [9, 9, 9])) == [4, 0, 4], "one has left"
    assert plan.lengths(load_of([100, 101, 102], [0, 5, 0])) is None, "nobody may draft"
    for _ in range(2):
        assert plan.lengths(load_of([100, 101, 102], [9, 9, 9])) == [4, 0, 4]
    assert plan.lengths(load_of([100, 101, 102], [9, 9, 9])) is None, "thought over after seven rounds"
    short = plan_of([1, 2], [9, 9], [2, 1])
    assert short.lengths(load_of([2, 3], [9, 9])) == [1, 2], "where nobody was asked for all, nobody is"


@pytest.mark.parametrize(
    ("saving", "num_rounds", "found"), [(0.1, 2, 4), (0.1, 100, 7), (0.2, 100, 7), (0.3, 3, 6), (0.3, 100, 31)]
)
def test_plans_stand_longer_where_drafting_clearly_pays_and_as_far_as_that_is_known(
    saving: float, num_rounds: int, found: int
) -> None:
    assert rounds_to_stand(saving=saving, num_rounds=num_rounds) == found


def test_a_plan_sums_what_its_rounds_save_but_not_those_with_prompts_and_bounds_hiccups() -> None:
    plan = plan_of([1, 2], [90, 90], [4, 4])
    plan.note(load_of([1, 2], [90, 90]), outcome([2, 1], step_s=0.013))
    assert plan.saved == pytest.approx(1.5 - 0.5)
    plan.note(load_of([1, 2], [90, 90]), outcome([4, 4], step_s=0.5, num_prefill_tokens=100))
    assert (plan.num_seen, plan.saved) == (1, pytest.approx(1.0))
    plan.note(load_of([1, 2], [90, 90]), outcome([0, 0], step_s=9.0))
    assert (plan.num_seen, plan.saved) == (2, pytest.approx(1.0 - 3.0))


def test_a_plan_weighs_rows_by_what_their_tokens_are_worth() -> None:
    load = load_of([1, 2], [90, 9])
    worth = np.array([1.5, 0.5])
    plan = StandingPlan.of_round(load, [4, 4], most=4, price=0.3, plain_s=0.01, num_rounds=7, worth=worth)
    assert plan.prices([1, 2, 3]) == pytest.approx([0.2, 0.6, 0.3]), "a new row is worth the mean"
    plan.note(load, outcome([2, 1], step_s=0.008))
    assert plan.saved == pytest.approx((2 * 1.5 + 1 * 0.5) / 2)
    assert plan_of([1, 2], [9, 9], [4, 4]).prices([1, 2]) == [0.3, 0.3]


def test_plain_rounds_come_now_and_then_and_soon_where_their_cost_is_in_doubt() -> None:
    def rounds_until_due(*, saved: float = 0.1, is_trusted: bool = True) -> int:
        plain, gate = PlainRounds(), Gate(is_open=True, saved=saved, num_rounds=100)
        plain.note_plain(4, is_alone=True)
        while not plain.is_due(gate, 4, is_trusted=is_trusted):
            plain.note_drafted()
        return plain.num_rounds - 1

    assert (rounds_until_due(), rounds_until_due(saved=0.5), rounds_until_due(is_trusted=False)) == (64, 512, 8)


def test_a_plain_round_that_shares_its_step_with_prompts_does_not_count() -> None:
    plain, gate = PlainRounds(), Gate(is_open=True)
    for _ in range(8):
        plain.note_drafted()
    plain.note_plain(4, is_alone=False)
    for _ in range(8):
        assert not plain.is_due(gate, 4, is_trusted=False)
        plain.note_drafted()
    assert plain.is_due(gate, 4, is_trusted=False)


def test_one_cut_in_sixteen_is_not_made_unless_it_gains_much() -> None:
    full = FullDrafts()
    assert [full.are_due(0.1) for _ in range(32)] == [False] * 15 + [True] + [False] * 15 + [True]
    assert not any(full.are_due(gain) for gain in (0.0, 0.4) for _ in range(16))


def test_rows_that_are_not_worth_it_are_asked_again_each_in_its_turn() -> None:
    rows = AskedRows()
    handles = list(range(5))
    asked = sum(rows.choose(handles, np.zeros(5, bool)).astype(int) for _ in range(64))
    assert np.asarray(asked).tolist() == [2] * 5
