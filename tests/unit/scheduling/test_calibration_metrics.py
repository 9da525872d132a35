"""Calibration metrics against definitions written out as loops, on ragged random rounds with ties."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.scheduling.calibration import (
    auc,
    brier,
    calibration_error_floor,
    expected_calibration_error,
    reliability,
    survival_quality,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def slow_ece(chances: list[float], happened: list[bool], num_bins: int) -> float:
    total = 0.0
    for b in range(num_bins):
        inside = [
            (c, h)
            for c, h in zip(chances, happened, strict=True)
            if b / num_bins <= c < (b + 1) / num_bins or (b == num_bins - 1 and c == 1.0)
        ]
        if inside:
            mean_chance = sum(c for c, _ in inside) / len(inside)
            frequency = sum(h for _, h in inside) / len(inside)
            total += len(inside) / len(chances) * abs(mean_chance - frequency)
    return total


def slow_auc(scores: list[float], happened: list[bool]) -> float | None:
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, came_true in zip(scores, happened, strict=True)
        if came_true
        for b, other in zip(scores, happened, strict=True)
        if not other
    ]
    return sum(wins) / len(wins) if wins else None


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_their_definitions(seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few distinct values, so that there are ties, and both ends of the scale. A bin's edge is no such value.
    chances: Floats = random.choice([0.0, 0.11, 0.34, 0.52, 0.77, 0.93, 1.0], int(random.integers(5, 90)))
    happened: Bools = random.random(len(chances)) < chances**1.5
    as_lists = chances.tolist(), happened.tolist()
    assert expected_calibration_error(chances, happened, num_bins=7) == pytest.approx(slow_ece(*as_lists, 7))
    assert auc(chances, happened) == pytest.approx(slow_auc(*as_lists))
    assert brier(chances, happened) == pytest.approx(
        sum((c - h) ** 2 for c, h in zip(*as_lists, strict=True)) / len(chances)
    )
    bins = reliability(chances, happened, num_bins=7)
    assert sum(b.num_predictions for b in bins) == len(chances)
    assert sum(b.num_predictions * abs(b.chance - b.frequency) for b in bins) / len(chances) == pytest.approx(
        slow_ece(*as_lists, 7)
    )


def test_ece_and_auc_by_hand() -> None:
    chances = np.array([0.9, 0.9, 0.1, 0.1])
    assert expected_calibration_error(chances, np.array([True, True, False, False])) == pytest.approx(0.1)
    assert expected_calibration_error(chances, np.array([True, False, True, False])) == pytest.approx(0.4)
    assert auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])) == pytest.approx(0.875)


def test_predictions_that_say_the_truth_have_no_error_and_constants_rank_nothing() -> None:
    random = np.random.default_rng(0)
    chances: Floats = random.random(40_000)
    happened: Bools = random.random(40_000) < chances
    assert expected_calibration_error(chances, happened) < 0.01
    constant = np.full(40_000, 0.5)
    assert auc(constant, happened) == 0.5
    assert brier(chances, happened) < brier(constant, happened)
    assert auc(chances, np.ones(40_000, bool)) is None
    assert expected_calibration_error(np.zeros(0), np.zeros(0, bool)) == 0.0


def test_the_floor_is_the_error_that_true_chances_show() -> None:
    random = np.random.default_rng(4)
    chances: Floats = random.random(700)
    shown = [expected_calibration_error(chances, random.random(700) < chances) for _ in range(300)]
    assert calibration_error_floor(chances) == pytest.approx(float(np.mean(shown)), rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_only_known_outcomes_of_offered_positions_are_judged(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_rounds, num_positions = 60, 5
    offered = random.integers(0, num_positions + 1, num_rounds)
    verified = np.minimum(offered, random.integers(0, num_positions + 1, num_rounds))
    accepted = np.minimum(verified, random.integers(0, num_positions + 1, num_rounds))
    survival: Floats = np.cumprod(random.random((num_rounds, num_positions)), axis=1)
    found = {
        q.position: q
        for q in survival_quality(survival, num_offered=offered, num_verified=verified, num_accepted=accepted)
    }
    for position in range(num_positions):
        known = [
            r
            for r in range(num_rounds)
            if position < offered[r] and (position < verified[r] or accepted[r] < verified[r])
        ]
        assert (position in found) == bool(known)
        if known:
            stood = np.array([bool(accepted[r] > position) for r in known])
            quality = found[position]
            assert quality.num_rounds == len(known)
            assert quality.frequency == pytest.approx(stood.mean())
            assert quality.ece == pytest.approx(expected_calibration_error(survival[known, position], stood))
            assert quality.brier == pytest.approx(brier(survival[known, position], stood))
