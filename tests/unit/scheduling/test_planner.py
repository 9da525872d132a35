"""The admitted set is the best of all prefix lengths, found by trying every one of them on small cases."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.scheduling.planner import admit, admit_budget, admit_early_stop

Floats = NDArray[np.float64]


def stepped(num_extra: Floats) -> Floats:
    """A cost with a jump: 5 more tokens are nearly free, then each is dear."""
    seconds: Floats = 1.0 + 0.01 * num_extra + 0.3 * np.maximum(0.0, num_extra - 5)
    return seconds


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_prefix_lengths_has_a_better_rate(seed: int) -> None:
    rng = random.Random(seed)
    rows = [np.cumprod([rng.uniform(0.2, 1.0) for _ in range(rng.choice([0, 1, 3, 5]))]) for _ in range(3)]
    admitted = admit(np.concatenate(rows), num_rows=3, step_seconds=stepped, draft_s=0.05)
    best = max(
        (3 + sum(float(row[:n].sum()) for row, n in zip(rows, lengths, strict=True)))
        / (0.05 + float(stepped(np.array([sum(lengths)]))[0]))
        for lengths in itertools.product(*(range(len(row) + 1) for row in rows))
    )
    assert admitted.tokens_per_s == pytest.approx(best)
    assert_prefixes(admitted.mask, rows)


@pytest.mark.parametrize("seed", range(20))
def test_early_stop_takes_tokens_one_by_one_until_the_rate_would_fall(seed: int) -> None:
    rng = random.Random(100 + seed)
    rows = [np.cumprod([rng.choice([1.0, 0.9, 0.5]) for _ in range(rng.choice([0, 2, 3, 5]))]) for _ in range(3)]
    survival = np.concatenate(rows)
    admitted = admit_early_stop(survival, num_rows=3, step_seconds=stepped, draft_s=0.05)
    taken, rate = 0.0, 3 / (0.05 + 1.0)
    count = 0
    for chance in sorted(survival.tolist(), reverse=True):
        next_rate = (3 + taken + chance) / (0.05 + float(stepped(np.array([count + 1.0]))[0]))
        if next_rate < rate:
            break
        taken, rate, count = taken + chance, next_rate, count + 1
    assert admitted.mask.sum() == count
    assert admitted.tokens_per_s == pytest.approx(rate)
    assert_prefixes(admitted.mask, rows)


def test_early_stop_stays_in_front_of_a_stair_that_the_global_search_takes() -> None:
    def stair(num_extra: Floats) -> Floats:
        return np.where(num_extra == 0, 1.0, 1.85)

    few = admit_early_stop(np.array([0.8, 0.7, 0.7]), num_rows=1, step_seconds=stair, draft_s=0.0)
    all_of_them = admit(np.array([0.8, 0.7, 0.7]), num_rows=1, step_seconds=stair, draft_s=0.0)
    assert few.mask.sum() == 0
    assert all_of_them.mask.all()


@pytest.mark.parametrize("budget", [0, 1, 4, 99])
def test_a_budget_goes_to_the_likeliest_tokens_and_ties_to_the_earlier_place(budget: int) -> None:
    rows = [np.array([1.0, 1.0, 0.3]), np.array([1.0, 0.9]), np.zeros(0)]
    admitted = admit_budget(np.concatenate(rows), budget=budget, num_rows=3, step_seconds=stepped, draft_s=0.0)
    order = [0, 1, 3, 4, 2]
    assert sorted(np.flatnonzero(admitted.mask).tolist()) == sorted(order[:budget])
    assert_prefixes(admitted.mask, rows)


def test_equal_survivals_are_taken_in_draft_order() -> None:
    admitted = admit(np.ones(6), num_rows=1, step_seconds=stepped, draft_s=0.0)
    assert admitted.mask.tolist() == [True] * 5 + [False]


def test_tokens_that_seldom_come_cost_as_seldom() -> None:
    always = admit(np.full(20, 0.5), num_rows=20, step_seconds=stepped, draft_s=0.0)
    seldom = admit(np.full(20, 0.5), num_rows=20, step_seconds=stepped, draft_s=0.0, offered=np.full(20, 0.25))
    assert always.num_tokens == 5
    assert seldom.mask.sum() == 20
    assert seldom.num_tokens == pytest.approx(5.0)


def assert_prefixes(mask: NDArray[np.bool_], rows: list[Floats]) -> None:
    start = 0
    for row in rows:
        chosen = mask[start : start + len(row)].tolist()
        assert chosen == sorted(chosen, reverse=True), "a prefix of each row"
        start += len(row)


def test_nothing_is_admitted_where_nothing_survives() -> None:
    assert not admit(np.zeros(4), num_rows=2, step_seconds=stepped, draft_s=0.1).mask.any()
    assert admit(np.zeros(0), num_rows=2, step_seconds=stepped, draft_s=0.0).tokens_per_s == pytest.approx(2.0)
