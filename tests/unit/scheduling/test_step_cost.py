"""Costs refined by the engine's own times: shape and level are found, outliers and drifting machines bend nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dspark_batch.scheduling.cost import DraftCost, Seen, StepCost
from dspark_batch.scheduling.cost_table import CostTable, DraftSample


def true_cost(num_tokens: float) -> float:
    return 0.01 + 0.0005 * num_tokens


def measured(scale: float = 1.0) -> StepCost:
    return StepCost(CostTable.from_function(lambda t, r, c: scale * true_cost(t), rows=(1, 4, 16, 64)))


def wrong() -> StepCost:
    """Knows nothing of the price of a token."""
    return StepCost(CostTable.from_function(lambda t, r, c: 0.02, rows=(1, 4, 16, 64)))


def ratio(cost: StepCost, small: int, large: int, *, num_rows: int = 8) -> float:
    low, high = cost.seconds([small, large], num_rows=num_rows, context_tokens=0).tolist()
    return high / low


def at(cost: StepCost, num_tokens: int, *, num_rows: int = 8) -> float:
    return float(cost.seconds([num_tokens], num_rows=num_rows, context_tokens=0)[0])


def see(cost: StepCost, num_tokens: int, seconds: float, *, num_rows: int = 8) -> None:
    cost.observe(num_tokens, seconds, num_rows=num_rows, context_tokens=0)


def test_a_wrong_shape_is_mended_by_the_steps_that_are_run() -> None:
    cost, rng = wrong(), random.Random(1)
    for _ in range(300):
        count = rng.choice([8, 16, 32, 64])
        see(cost, count, true_cost(count) * rng.uniform(0.95, 1.05))
    assert ratio(cost, 8, 64) == pytest.approx(true_cost(64) / true_cost(8), rel=0.08)
    assert at(cost, 32) == pytest.approx(true_cost(32), rel=0.1)


def test_what_is_learned_at_many_rows_does_not_bend_the_cost_at_few() -> None:
    cost = measured()
    for _ in range(60):
        for count in (64, 128):
            see(cost, count, 5.0 * true_cost(count) if count > 64 else true_cost(count), num_rows=64)
    assert ratio(cost, 2, 16, num_rows=2) == pytest.approx(true_cost(16) / true_cost(2), rel=0.01)
    assert ratio(cost, 64, 128, num_rows=64) > 2.0 * true_cost(128) / true_cost(64)


def test_outliers_do_not_move_it() -> None:
    cost, rng = measured(), random.Random(2)
    for step in range(400):
        count = rng.choice([8, 64])
        see(cost, count, true_cost(count) * (20.0 if step % 23 == 7 else 1.0))
    assert ratio(cost, 8, 64) == pytest.approx(true_cost(64) / true_cost(8), rel=0.1)


def test_a_machine_that_slows_down_keeps_the_shape() -> None:
    """One size is seen before the change and the other after it."""
    cost = measured()
    for _ in range(50):
        see(cost, 8, true_cost(8))
    for _ in range(100):
        see(cost, 64, 3.0 * true_cost(64))
    assert at(cost, 64) == pytest.approx(3.0 * true_cost(64), rel=0.1)
    assert ratio(cost, 8, 64) < 2.0 * true_cost(64) / true_cost(8)


def test_it_never_falls_with_more_tokens() -> None:
    cost, rng = measured(), random.Random(3)
    for _ in range(200):
        see(cost, rng.randint(8, 700), rng.uniform(0.01, 0.1))
    seconds = cost.seconds(np.arange(8.0, 5000.0), num_rows=8, context_tokens=0)
    assert (np.diff(seconds) >= 0).all()
    assert (seconds > 0).all()


def test_a_step_without_a_time_is_ignored() -> None:
    cost = measured()
    see(cost, 8, 0.0)
    assert cost.seen(8, num_rows=8) is Seen.NEVER
    see(cost, 8, 0.1)
    see(cost, 64, 0.2)
    assert cost.seen(8, num_rows=8) is Seen.AS_EXPECTED


def test_drafting_costs_are_split_into_call_rows_and_tokens() -> None:
    cost, rng = DraftCost(), random.Random(4)
    assert not cost.is_known
    for _ in range(300):
        rows, longest = rng.randint(1, 32), rng.randint(1, 8)
        cost.observe(rows, longest, 0.001 + 0.0001 * rows + 0.002 * longest)
    assert cost.is_known
    assert cost.seconds(16, 4) == pytest.approx(0.0106, rel=0.1)
    assert cost.seconds(16, 8) == pytest.approx(0.0186, rel=0.1)
    assert cost.seconds(0, 8) == cost.seconds(16, 0) == 0.0


def test_a_drafting_cost_of_one_kind_only_is_still_predicted() -> None:
    cost = DraftCost()
    assert cost.seconds(8, 16) == 0.0
    for _ in range(20):
        cost.observe(8, 16, 0.002)
    assert cost.seconds(8, 16) == pytest.approx(0.002, rel=0.05)


def test_measured_drafts_are_interpolated_and_follow_the_machine() -> None:
    samples = [DraftSample(r, k, 0.001 + 0.0001 * r * k) for r in (1, 4, 16) for k in (1, 7)]
    cost = DraftCost(samples)
    assert cost.is_known
    assert cost.seconds(10, 4) == pytest.approx(0.005, rel=0.01)
    assert cost.seconds(64, 7) == pytest.approx(0.001 + 0.0001 * 448, rel=0.01)
    for _ in range(100):
        cost.observe(4, 7, 2.0 * (0.001 + 0.0001 * 28))
    assert cost.seconds(16, 7) == pytest.approx(2.0 * (0.001 + 0.0001 * 112), rel=0.05)
