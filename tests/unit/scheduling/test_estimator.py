"""Acceptance estimates: censored labels, rows that differ, confidences that boast."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dspark_batch.scheduling.estimator import AcceptanceHistory


def play(history: AcceptanceHistory, chances: list[float], *, length: int, rounds: int, handle: int = 0) -> None:
    rng = random.Random(handle + length)
    for _ in range(rounds):
        held = 0
        while held < length and rng.random() < chances[held]:
            held += 1
        history.observe([handle], np.array([length]), np.array([held]))


def test_conditional_chances_are_found_under_censoring() -> None:
    """Verify lengths of 3 and 7 take turns: what was never reached must not count as rejected."""
    truth = [0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6]
    history, rng = AcceptanceHistory(7), random.Random(0)
    for _ in range(3000):
        length = rng.choice([3, 7])
        handles, held = list(range(8)), []
        for _ in handles:
            n = 0
            while n < length and rng.random() < truth[n]:
                n += 1
            held.append(n)
        history.observe(handles, np.full(8, length), np.array(held))
    np.testing.assert_allclose(history.chances(), truth, atol=0.12)


def test_positions_that_were_never_tried_take_the_chance_before_them() -> None:
    history = AcceptanceHistory(6)
    play(history, [1.0, 1.0], length=2, rounds=100)
    assert history.chances()[5] == pytest.approx(history.chances()[1])
    assert history.chances()[5] > 0.95


def test_a_good_row_is_trusted_more_than_a_bad_one_and_a_new_one_like_the_job() -> None:
    history = AcceptanceHistory(4)
    for _ in range(30):
        history.observe([1, 2], np.array([4, 4]), np.array([4, 0]))
    survival = history.survival([1, 2, 3], 4)
    assert survival.shape == (3, 4)
    assert (np.diff(survival, axis=1) <= 0).all()
    assert survival[0, 0] > survival[2, 0] > survival[1, 0]


def test_rows_that_left_are_forgotten() -> None:
    history = AcceptanceHistory(4)
    history.observe([1, 2], np.array([4, 4]), np.array([4, 0]))
    assert history.keep_only([2, 9]) == 1
    assert history.survival([1], 1)[0, 0] == pytest.approx(history.survival([9], 1)[0, 0])


def test_offer_rates_fall_along_the_draft() -> None:
    history = AcceptanceHistory(3)
    for _ in range(200):
        history.observe_offers(np.array([3, 3]), np.array([3, 0]))
    np.testing.assert_allclose(history.offer_rates(), 0.5, atol=0.05)


def test_it_begins_with_what_was_measured_before_and_gives_way_to_what_is_seen() -> None:
    history = AcceptanceHistory(6, [0.8, 0.4, 0.2])
    assert history.num_labels > 16
    np.testing.assert_allclose(history.survival([0], 3)[0], [0.8, 0.4, 0.2], atol=0.03)
    play(history, [0.2, 0.2], length=2, rounds=300)
    assert history.survival([7], 2)[0, 0] < 0.3


def test_expectations_beyond_the_longest_draft_are_left_out() -> None:
    assert AcceptanceHistory(1, [0.8, 0.4]).chances() == pytest.approx([0.8], abs=0.02)
