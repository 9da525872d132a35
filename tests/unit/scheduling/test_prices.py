"""What a round saved, in plain steps."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.scheduling.cost import DraftCost
from dspark_batch.scheduling.cost_table import DraftSample
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.prices import Prices
from dspark_batch.testing.schedule_world import known_cost

ASKED = np.array([4, 4])
DRAFT_S = 0.002


def step_s(tokens: int, rows: int) -> float:
    return 0.010 + 0.0005 * tokens


def saved(step_seconds: float, *, num_prefill_tokens: int = 0, worth: tuple[float, float] | None = None) -> float:
    """Two rows, four drafted tokens each, of which three and one held."""
    prices = Prices(known_cost(step_s), DraftCost([DraftSample(2, 4, DRAFT_S)]))
    load = RoundLoad(handles=[1, 2], limits=[9, 9], num_prefill_tokens=num_prefill_tokens, num_queued=0)
    outcome = RoundOutcome([4, 4], [3, 1], 10 + num_prefill_tokens, num_prefill_tokens, DRAFT_S, step_seconds)
    return prices.saved(load, ASKED, outcome, None if worth is None else np.array(worth))


def test_accepted_tokens_count_as_plain_steps_less_the_extra_time() -> None:
    extra = step_s(10, 2) - step_s(2, 2) + DRAFT_S
    assert saved(step_s(10, 2)) == pytest.approx(4 / 2 - extra / step_s(2, 2), rel=1e-3)
    assert saved(step_s(10, 2) + 0.001) == pytest.approx(4 / 2 - (extra + 0.001) / step_s(2, 2), rel=1e-3)


def test_tokens_of_rows_that_are_worth_more_count_more() -> None:
    assert saved(0.015, worth=(1.5, 0.5)) - saved(0.015) == pytest.approx((1.5 * 3 + 0.5 * 1) / 2 - 4 / 2)


def test_the_time_of_a_step_that_is_mostly_prompt_tells_nothing() -> None:
    usual, slow = (saved(factor * step_s(110, 2), num_prefill_tokens=100) for factor in (1.0, 1.5))
    assert slow == usual
    few = (saved(factor * step_s(14, 2), num_prefill_tokens=4) for factor in (1.0, 1.5))
    assert np.diff(list(few)) < -0.3
