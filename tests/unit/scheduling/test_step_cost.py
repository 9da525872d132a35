"""Learned costs: the shape and the level are found, outliers and drifting machines do not bend them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dspark_batch.scheduling.cost import KNOTS, DraftCost, StepCost, monotone
from dspark_batch.scheduling.profiler import profile_steps


def true_cost(num_tokens: float) -> float:
    return 0.01 + 0.0005 * num_tokens


def ratio(cost: StepCost, small: int, large: int) -> float:
    low, high = cost.seconds(np.array([small, large])).tolist()
    return high / low


def test_the_shape_is_learned_without_a_seed() -> None:
    cost, rng = StepCost(), random.Random(1)
    for _ in range(300):
        count = rng.choice([8, 16, 32, 64])
        cost.observe(count, true_cost(count) * rng.uniform(0.95, 1.05))
    assert ratio(cost, 8, 64) == pytest.approx(true_cost(64) / true_cost(8), rel=0.08)
    assert cost.seconds(np.array([32]))[0] == pytest.approx(true_cost(32), rel=0.1)


def test_outliers_do_not_move_it() -> None:
    cost, rng = StepCost({n: true_cost(n) for n in (1, 8, 64)}), random.Random(2)
    for step in range(400):
        count = rng.choice([8, 64])
        cost.observe(count, true_cost(count) * (20.0 if step % 23 == 7 else 1.0))
    assert ratio(cost, 8, 64) == pytest.approx(true_cost(64) / true_cost(8), rel=0.1)


def test_a_machine_that_slows_down_keeps_the_shape() -> None:
    """One size is seen before the change and the other after it."""
    cost = StepCost({n: true_cost(n) for n in (1, 8, 64)})
    for _ in range(50):
        cost.observe(8, true_cost(8))
    for _ in range(100):
        cost.observe(64, 3.0 * true_cost(64))
    assert cost.seconds(np.array([64]))[0] == pytest.approx(3.0 * true_cost(64), rel=0.1)
    assert ratio(cost, 8, 64) < 2.0 * true_cost(64) / true_cost(8)


def test_it_never_falls_with_more_tokens() -> None:
    cost, rng = StepCost(), random.Random(3)
    for _ in range(200):
        cost.observe(rng.randint(1, 700), rng.uniform(0.01, 0.1))
    seconds = cost.seconds(np.arange(1, 5000))
    assert (np.diff(seconds) >= 0).all()
    assert (seconds > 0).all()


def test_a_step_without_a_time_is_ignored() -> None:
    cost = StepCost()
    cost.observe(4, 0.0)
    assert cost.steps_since(4) is None
    cost.observe(4, 0.1)
    cost.observe(64, 0.2)
    assert cost.steps_since(4) == 1


def test_sizes_beyond_the_seed_go_on_with_its_last_slope() -> None:
    cost = StepCost({8: 1.0, 16: 2.0})
    assert cost.seconds(np.array([64]))[0] == pytest.approx(8.0)


@pytest.mark.parametrize("seed", [None, {1: 0.5}, {1: 2.0, 4: 1.0, 16: 3.0}])
def test_any_seed_gives_a_rising_cost(seed: dict[int, float] | None) -> None:
    seconds = StepCost(seed).seconds(np.array(KNOTS))
    assert (np.diff(seconds) >= 0).all()


def test_monotone_pools_by_weight_and_keeps_what_rises() -> None:
    ones = np.ones(4)
    assert monotone(np.array([1.0, 2.0, 3.0, 4.0]), ones).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert monotone(np.array([1.0, 3.0, 1.0, 4.0]), np.array([1.0, 3.0, 1.0, 1.0])).tolist() == [1.0, 2.5, 2.5, 4.0]


def test_drafting_costs_are_split_into_call_rows_and_tokens() -> None:
    cost, rng = DraftCost(), random.Random(4)
    for _ in range(300):
        rows, longest = rng.randint(1, 32), rng.randint(1, 8)
        cost.observe(rows, longest, 0.001 + 0.0001 * rows + 0.002 * longest)
    assert cost.seconds(16, 4) == pytest.approx(0.0106, rel=0.1)
    assert cost.seconds(16, 8) == pytest.approx(0.0186, rel=0.1)


def test_a_drafting_cost_of_one_kind_only_is_still_predicted() -> None:
    cost = DraftCost()
    assert cost.seconds(8, 16) == 0.0
    for _ in range(20):
        cost.observe(8, 16, 0.002)
    assert cost.seconds(8, 16) == pytest.approx(0.002, rel=0.05)


def test_the_profile_keeps_the_least_time_of_each_size_that_fits() -> None:
    calls: list[int] = []

    def run(count: int) -> float | None:
        calls.append(count)
        return None if count > 4 else count + len(calls) / 100

    found = profile_steps(run, token_counts=(1, 4, 16), num_passes=2)
    assert calls == [1, 1, 4, 16, 1, 4, 16]
    assert found == {1: 1.02, 4: 4.03}
