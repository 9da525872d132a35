"""What a token of each row is worth while a batch drains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.worth import RowWorth

ONE_S, ROW_S = 0.008, 0.001
"""Seconds of a plain step of one row, and what every other row adds."""


def load_of(num_left: Sequence[int], *, num_queued: int = 0, num_prefill_tokens: int = 0) -> RoundLoad:
    return RoundLoad(
        handles=range(len(num_left)),
        limits=[3] * len(num_left),
        num_prefill_tokens=num_prefill_tokens,
        num_queued=num_queued,
        num_left=num_left,
    )


def share_of_rows(num_rows: int) -> float:
    return num_rows * ROW_S / (ONE_S + (num_rows - 1) * ROW_S)


def all_at_limit() -> RowWorth:
    rows = RowWorth()
    rows.observe(load_of([1] * 1000), outcome([1] * 1000))
    rows.num_finished = 998
    return rows


def outcome(emitted: Sequence[int]) -> RoundOutcome:
    return RoundOutcome([0] * len(emitted), [0] * len(emitted), len(emitted), 0, 0.0, 0.01, [[7] * n for n in emitted])


def test_all_are_alike_while_rows_wait_or_have_about_as_much_to_go() -> None:
    rows = RowWorth()
    assert rows.may_differ(load_of([100, 1]))
    assert not rows.may_differ(load_of([100, 1], num_queued=1))
    assert not rows.may_differ(load_of([100, 1], num_prefill_tokens=1)), "rows without a token yet are longer than all"
    assert not rows.may_differ(load_of([100]))
    assert not rows.may_differ(RoundLoad(handles=[1, 2], limits=[9, 9], num_prefill_tokens=0, num_queued=0))
    assert rows.of_rows([100, 98, 97], share_of_rows=0.1) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_are_worth_most_and_those_below_half_of_it_what_a_row_costs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.integers(1, 200, rng.integers(3, 40))
    share = share_of_rows(len(left))
    worth = all_at_limit().of_rows(left.tolist(), share_of_rows=share)
    assert worth is not None
    assert worth.mean() == pytest.approx(1.0)
    assert (np.diff(worth[np.argsort(left)]) >= -1e-12).all()
    assert worth[2 * left <= left.max()] == pytest.approx(share)


def test_the_time_that_a_job_still_takes_falls_by_what_a_token_is_worth() -> None:
    """Plain decoding of one long row and short ones, by arithmetic."""

    def seconds_to_go(left: Sequence[int]) -> float:
        return sum(ONE_S + ROW_S * (sum(n > t for n in left) - 1) for t in range(max(left)))

    left = [90, 20, 10, 5]
    worth = all_at_limit().of_rows(left, share_of_rows=share_of_rows(4))
    assert worth is not None
    whole = ONE_S + 3 * ROW_S
    for row in range(4):
        sooner = [n - (r == row) for r, n in enumerate(left)]
        saved = (seconds_to_go(left) - seconds_to_go(sooner)) / whole
        assert worth[row] / 4 == pytest.approx(saved)


def test_a_row_more_may_cost_nothing_or_all() -> None:
    free = all_at_limit().of_rows([100, 9, 9, 9], share_of_rows=0.0)
    assert free is not None
    assert free[0] == pytest.approx(4.0)
    assert (free[1:] > 0).all()
    assert (free[1:] < 0.1).all(), "never nothing: prices are divided by it"
    assert all_at_limit().of_rows([100, 9, 9, 9], share_of_rows=1.0) == pytest.approx([1.0] * 4)


def test_limits_count_as_far_as_rows_have_ended_at_theirs() -> None:
    rows = RowWorth()
    assert rows.share_at_limit == 0.5
    whole = all_at_limit().of_rows([100, 9], share_of_rows=0.2)
    half = rows.of_rows([100, 9], share_of_rows=0.2)
    assert whole is not None
    assert half == pytest.approx((whole + 1.0) / 2)
    rows.observe(load_of([1, 4]), outcome([1, 2]))
    rows.num_finished = 1
    assert rows.share_at_limit == pytest.approx(2 / 3)
    rows.observe(load_of([40, 40]), outcome([4, 4]))
    rows.num_finished = 3
    assert rows.share_at_limit == pytest.approx(2 / 5), "a whole draft that a step had room for is no end"
    rows.num_finished = 100
    assert not rows.may_differ(load_of([100, 9])), "limits that nobody reaches say nothing"
    rows.observe(load_of([9, 9]), RoundOutcome([0, 0], [0, 0], 2, 0, 0.0, 0.01))
