"""Flat drafts and running products, against loops over rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dspark_batch.scheduling.logistic import token_features
from dspark_batch.scheduling.survival import (
    FlatDraft,
    SurvivalModel,
    few_features,
    many_features,
    positions,
    running_product,
)
from dspark_batch.tensors import DraftBlock


def test_flat_drafts_keep_rows_and_positions_of_ragged_input() -> None:
    draft = DraftBlock(token_ids=[(1, 2, 3), (), (4,)], confidence=[(0.1, 0.2, 0.3), (), (0.4,)])
    flat = FlatDraft.of(draft)
    assert flat.offered.tolist() == [3, 0, 1]
    assert flat.row.tolist() == [0, 0, 0, 2]
    assert flat.position.tolist() == [0, 1, 2, 0]
    assert flat.features is not None
    expected = token_features(flat.position, confidence=np.array([0.1, 0.2, 0.3, 0.4]), margin=None)
    np.testing.assert_array_equal(flat.features, expected)
    assert FlatDraft.of(DraftBlock(token_ids=[(), ()])).features is None


def test_running_products_equal_a_loop_and_never_rise_within_a_row() -> None:
    rng = random.Random(3)
    lengths = [rng.choice([0, 1, 3, 7, 13]) for _ in range(57)]
    chances = [[rng.choice([1.0, 0.999999, rng.random(), 1.2]) for _ in range(n)] for n in lengths]
    found = running_product(np.array([c for row in chances for c in row]), np.array(lengths))
    expected = [np.cumprod(np.minimum(row, 1.0)) for row in chances]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-12)
    flat = positions(np.array(lengths))
    assert (np.diff(found)[flat[1:] > 0] <= 0).all()
    assert len(running_product(np.zeros(0), np.zeros(3, np.int64))) == 0


def ragged_draft(seed: int, says: str, *, num_rows: int = 11) -> DraftBlock:
    """Drafts of 0 to 5 tokens; confidences of 1, and margins that are NaN, among what is said of them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, num_rows).tolist()
    confidence = [[1.0 if rng.random() < 0.1 else rng.random() for _ in range(n)] for n in lengths]
    lost = 0.3 if says == "both" else 0.0
    margin = [[float("nan") if rng.random() < lost else rng.exponential(3.0) for _ in range(n)] for n in lengths]
    return DraftBlock(
        token_ids=[[1] * n for n in lengths],
        confidence=None if says == "margin" else confidence,
        margin=None if says == "confidence" else margin,
    )


SAYS = pytest.mark.parametrize("says", ["confidence", "margin", "both"])


@SAYS
@pytest.mark.parametrize("seed", range(6))
def test_features_token_by_token_equal_those_by_columns(seed: int, says: str) -> None:
    draft = ragged_draft(seed, says)
    position = positions(np.array([len(tokens) for tokens in draft.token_ids]))
    np.testing.assert_allclose(few_features(draft), many_features(draft, position), rtol=1e-12, atol=1e-12)
    nothing = DraftBlock(token_ids=[(), ()], confidence=[(), ()], margin=[(), ()])
    assert few_features(nothing).shape == many_features(nothing, position[:0]).shape == (0, 6)


@SAYS
@pytest.mark.parametrize("seed", range(6))
def test_lengths_above_a_survival_are_those_of_all_survivals(seed: int, says: str) -> None:
    rng, model = np.random.default_rng(seed), SurvivalModel(5)
    for lesson in range(40):
        draft = ragged_draft(100 * seed + lesson, says)
        flat = FlatDraft.of(draft)
        model.see(draft, flat, flat.offered)
        held = np.minimum(rng.geometric(0.3, 11) - 1, flat.offered)
        model.observe(range(11), flat, np.minimum(held + 1, flat.offered), held)
        survival = model.of_draft(range(11), flat)
        for prices in (np.zeros(11), rng.random(11), np.full(11, 1.1)):
            expected = np.bincount(flat.row[survival >= prices[flat.row]], minlength=11)
            assert model.lengths_above(draft, prices.tolist()) == expected.tolist()
    silent = DraftBlock(token_ids=[(1, 2), ()])
    assert SurvivalModel(2).lengths_above(silent, [0.9, 0.9]) == [2, 0]


def test_a_silent_drafter_is_judged_by_position_and_a_talking_one_by_its_word() -> None:
    rng = np.random.default_rng(0)
    silent, talking = SurvivalModel(2), SurvivalModel(2)
    for _ in range(300):
        sure = rng.random(4) < 0.5
        held = (rng.random(4) < np.where(sure, 0.95, 0.2)).astype(np.int64)
        ids = [(1,)] * 4
        for model, said in ((silent, None), (talking, [(0.9 if s else 0.3,) for s in sure])):
            draft = DraftBlock(token_ids=ids, confidence=said)
            flat = FlatDraft.of(draft)
            model.see(draft, flat, np.ones(4, np.int64))
            model.observe(range(4), flat, np.ones(4, np.int64), held)
    assert not silent.has_signal
    assert talking.has_signal
    question = DraftBlock(token_ids=[(1,), (1,)], confidence=[(0.9,), (0.3,)])
    high, low = talking.of_draft([9, 9], FlatDraft.of(question)).tolist()
    assert high > 0.85
    assert low < 0.35
    plain = FlatDraft.of(DraftBlock(token_ids=[(1,), (1,)]))
    assert 0.4 < silent.of_draft([9, 9], plain)[0] < 0.75
