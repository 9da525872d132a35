"""The admitted set is the best of all prefix lengths, found by trying every one of them on small cases."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.scheduling.planner import admit

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
    start = 0
    for row in rows:
        chosen = admitted.mask[start : start + len(row)]
        assert chosen.tolist() == sorted(chosen.tolist(), reverse=True), "a prefix of each row"
        start += len(row)


def test_equal_survivals_are_taken_in_draft_order() -> None:
    admitted = admit(np.ones(6), num_rows=1, step_seconds=stepped, draft_s=0.0)
    assert admitted.mask.tolist() == [True] * 5 + [False]


def test_tokens_that_seldom_come_cost_as_seldom() -> None:
    always = admit(np.full(20, 0.5), num_rows=20, step_seconds=stepped, draft_s=0.0)
    seldom = admit(np.full(20, 0.5), num_rows=20, step_seconds=stepped, draft_s=0.0, offered=np.full(20, 0.25))
    assert always.num_tokens == 5
    assert seldom.mask.sum() == 20
    assert seldom.num_tokens == pytest.approx(5.0)


def test_nothing_is_admitted_where_nothing_survives() -> None:
    assert not admit(np.zeros(4), num_rows=2, step_seconds=stepped, draft_s=0.1).mask.any()
    assert admit(np.zeros(0), num_rows=2, step_seconds=stepped, draft_s=0.0).tokens_per_s == pytest.approx(2.0)
