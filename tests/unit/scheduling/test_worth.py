"""What a token of each row is worth while a batch drains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.worth import RowWorth

ONE_S, ROW_S = 0.008, 0.001


def load_of(limits: Sequence[int], *, num_queued: int = 0) -> RoundLoad:
    return RoundLoad(handles=range(len(limits)), limits=limits, num_prefill_tokens=0, num_queued=num_queued)


def worth_of(rows: RowWorth, limits: Sequence[int], *, row_s: float = ROW_S) -> np.ndarray | None:
    return rows.of_rows(load_of(limits), one_s=ONE_S, all_s=ONE_S + (len(limits) - 1) * row_s)


def outcome(emitted: Sequence[int]) -> RoundOutcome:
    return RoundOutcome([0] * len(emitted), [0] * len(emitted), len(emitted), 0, 0.0, 0.01, [[7] * n for n in emitted])


def test_all_are_alike_while_rows_wait_or_have_about_as_much_to_go() -> None:
    rows = RowWorth()
    assert rows.of_rows(load_of([100, 1], num_queued=1), one_s=ONE_S, all_s=2 * ONE_S) is None
    assert worth_of(rows, [99]) is None
    assert worth_of(rows, [99, 97, 96]) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_are_worth_most_and_those_below_half_of_it_what_a_row_costs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = rng.integers(0, 200, rng.integers(3, 40))
    worth = worth_of(RowWorth(), limits.tolist())
    assert worth is not None
    assert worth.mean() == pytest.approx(1.0)
    assert (np.diff(worth[np.argsort(limits)]) >= -1e-12).all()
    short = worth[2 * (limits + 1) <= limits.max() + 1]
    assert short == pytest.approx(ROW_S * len(limits) / (ONE_S + (len(limits) - 1) * ROW_S))


def test_the_time_that_a_job_still_takes_falls_by_what_a_token_is_worth() -> None:
    """Plain decoding of one long row and short ones, by arithmetic."""

    def seconds_to_go(left: Sequence[int]) -> float:
        return sum(ONE_S + ROW_S * (sum(n > t for n in left) - 1) for t in range(max(left)))

    left = [90, 20, 10, 5]
    worth = worth_of(RowWorth(), [n - 1 for n in left])
    assert worth is not None
    whole = ONE_S + 3 * ROW_S
    for row in range(4):
        sooner = [n - (r == row) for r, n in enumerate(left)]
        saved = (seconds_to_go(left) - seconds_to_go(sooner)) / whole
        assert worth[row] / 4 == pytest.approx(saved)


def test_a_row_more_may_cost_nothing_or_all() -> None:
    free = worth_of(RowWorth(), [99, 9, 9, 9], row_s=0.0)
    assert free is not None
    assert free[0] == pytest.approx(4.0)
    assert (free[1:] > 0).all()
    assert (free[1:] < 0.1).all(), "never nothing: a survival is divided by it"
    dear = worth_of(RowWorth(), [99, 9, 9, 9], row_s=ONE_S)
    assert dear == pytest.approx([1.0] * 4)


def test_limits_count_as_far_as_rows_have_ended_at_theirs() -> None:
    rows = RowWorth()
    before = worth_of(rows, [99, 9])
    rows.observe(load_of([0, 3]), outcome([1, 2]))
    rows.note_finished(1)
    assert rows.share_at_limit == 1.0
    assert before is not None
    assert worth_of(rows, [99, 9]) == pytest.approx(before)
    rows.note_finished(2)
    assert rows.share_at_limit == 0.5
    assert worth_of(rows, [99, 9]) == pytest.approx((before + 1.0) / 2)
    rows.note_finished(100)
    assert not rows.differs(load_of([99, 9])), "limits that nobody reaches say nothing"
    rows.observe(load_of([9, 9]), RoundOutcome([0, 0], [0, 0], 2, 0, 0.0, 0.01))
