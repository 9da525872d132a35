"""Lengths before the draft: the best of all combinations on small cases, and which rows are not asked at all."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import DraftCost
from dspark_batch.scheduling.cost_table import DraftSample
from dspark_batch.scheduling.lengths import best_lengths, costs_by_token, row_seconds, rows_worth_drafting

Floats = NDArray[np.float64]
ROWS = 3
GAMMA = 4


def step_seconds(num_extra: Floats) -> Floats:
    seconds: Floats = 1.0 + 0.05 * num_extra + 0.2 * np.maximum(0.0, num_extra - 5)
    return seconds


def by_block(call_s: float) -> DraftCost:
    return DraftCost([DraftSample(rows, tokens, call_s) for rows in (1, 8) for tokens in (1, 16)])


def by_token(token_s: float) -> DraftCost:
    return DraftCost([DraftSample(rows, tokens, token_s * tokens) for rows in (1, 8) for tokens in (1, 16)])


def rate(lengths: tuple[int, ...], survival: Floats, cost: DraftCost) -> float:
    gained = sum(float(survival[r, :n].sum()) for r, n in enumerate(lengths))
    draft_s = cost.seconds(ROWS, max(lengths))
    return (ROWS + gained) / (draft_s + float(step_seconds(np.array([float(sum(lengths))]))[0]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("call_s", [0.01, 0.4])
def test_no_other_lengths_have_a_better_expected_rate(seed: int, call_s: float) -> None:
    rng = random.Random(seed)
    survival = np.cumprod([[rng.uniform(0.2, 1.0) for _ in range(GAMMA)] for _ in range(ROWS)], axis=1)
    cost = by_block(call_s)
    lengths, factor = best_lengths(
        np.full(ROWS, GAMMA),
        survival,
        offered=np.ones(GAMMA),
        step_seconds=step_seconds,
        plain_s=1.0,
        draft_cost=cost,
    )
    best = max(
        rate(choice, survival, cost) for choice in itertools.product(range(GAMMA + 1), repeat=ROWS) if any(choice)
    )
    assert factor == pytest.approx(max(1.0, best / ROWS))
    assert bool(lengths.any()) == (best > ROWS)


def test_drafts_that_cost_by_the_token_are_shorter() -> None:
    survival = np.cumprod(np.full((ROWS, 16), 0.8), axis=1)
    chosen = {}
    for name, cost in (("cheap", by_token(1e-4)), ("dear", by_token(0.15))):
        assert costs_by_token(cost, num_rows=ROWS, longest=16, plain_s=1.0) == (name == "dear")
        lengths, _ = best_lengths(
            np.full(ROWS, 16),
            survival,
            offered=np.ones(16),
            step_seconds=lambda n: 1.0 + 0.001 * n,
            plain_s=1.0,
            draft_cost=cost,
        )
        chosen[name] = int(lengths.max())
    assert 0 < chosen["dear"] < chosen["cheap"]


def test_rows_that_never_accept_are_not_worth_a_forward_that_costs_by_the_row() -> None:
    survival = np.vstack([np.full((4, 7), 0.6), np.full((4, 7), 0.001)])
    dear = DraftCost([DraftSample(rows, 7, 0.1 + 0.05 * rows) for rows in (1, 4, 8)])
    row_s = row_seconds(dear, num_rows=8, longest=7)
    assert row_s == pytest.approx(0.05)
    assert rows_worth_drafting(survival, plain_s=1.0, row_s=row_s, token_s=0.0).tolist() == [True] * 4 + [False] * 4
    dear_tokens = rows_worth_drafting(survival, plain_s=1.0, row_s=row_s, token_s=0.125)
    assert not dear_tokens.any(), "their verification takes what they save"
    assert row_seconds(by_block(0.3), num_rows=8, longest=7) == pytest.approx(0.0)
    assert row_seconds(dear, num_rows=1, longest=7) == 0.0
