"""The online logistic: against a slow fit, under censoring, and against what it should learn."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.scheduling.calibration import auc, expected_calibration_error
from dspark_batch.scheduling.estimator import seen_slots
from dspark_batch.scheduling.exploration import Exploration
from dspark_batch.scheduling.logistic import (
    PositionLogistic,
    _solve_arrow,
    prior_weights,
    token_features,
    with_predecessors,
)
from dspark_batch.scheduling.simulator.acceptance import ParametricAcceptance

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class OneSignal:
    """``PositionLogistic`` for one of the two signals alone."""

    def __init__(self, num_positions: int, name: str) -> None:
        self.is_confidence = name == "confidence"
        prior = prior_weights(has_confidence=self.is_confidence, has_margin=not self.is_confidence)
        self.curves = PositionLogistic(num_positions, prior)

    def features(self, said: Floats, position: Ints) -> Floats:
        both = {"confidence": said if self.is_confidence else None, "margin": None if self.is_confidence else said}
        return token_features(position, **both)

    def chances(self, said: Floats, position: Ints) -> Floats:
        return self.curves.chances(self.features(said, position), position)

    def observe(self, said: Floats, position: Ints, held: Bools) -> None:
        self.curves.observe(self.features(said, position), position, held)


def sigmoid(x: Floats) -> Floats:
    out: Floats = 1 / (1 + np.exp(-x))
    return out


def slow_fit(features: Floats, position: Ints, held: Floats, prior: Floats, num_positions: int) -> Floats:
    """Gradient descent on the penalised likelihood of shared and own weights, all labels at once: [K, D]."""
    shared, own = prior.copy(), np.zeros((num_positions, len(prior)))
    rate = 0.5 / (len(held) + 8.0)
    for _ in range(20_000):
        miss = sigmoid((features * (shared + own[position])).sum(1)) - held
        each = np.zeros_like(own)
        np.add.at(each, position, features * miss[:, None])
        shared, own = shared - rate * (each.sum(0) + 1.0 * (shared - prior)), own - rate * (each + 8.0 * own)
    return shared + own


@pytest.mark.parametrize("num_labels", [3, 40, 300])
def test_one_fit_finds_what_gradient_descent_finds(num_labels: int) -> None:
    random = np.random.default_rng(num_labels)
    prior = np.array(prior_weights(has_confidence=True, has_margin=False))
    position = random.integers(0, 3, num_labels)
    features = np.stack([np.ones(num_labels), random.normal(size=num_labels)], axis=1)
    held = random.random(num_labels) < sigmoid(-1.0 + (0.5 + position) * features[:, 1])
    curves = PositionLogistic(3, prior.tolist())
    curves.observe(features, position, held)
    curves.fit()
    expected = slow_fit(features, position, held.astype(float), prior, 3)
    np.testing.assert_allclose(curves.weights, expected, atol=5e-3)


@pytest.mark.parametrize(("num_positions", "size"), [(1, 1), (4, 6), (17, 3)])
def test_the_arrow_is_solved_like_the_whole_matrix(num_positions: int, size: int) -> None:
    random = np.random.default_rng(size)
    root = random.normal(size=(num_positions, size, size))
    curvature = root @ root.transpose(0, 2, 1)
    whole = np.zeros((num_positions + 1, size, num_positions + 1, size))
    whole[0, :, 0, :] = curvature.sum(0) + 1.0 * np.eye(size)
    for k in range(num_positions):
        whole[k + 1, :, k + 1, :] = curvature[k] + 8.0 * np.eye(size)
        whole[0, :, k + 1, :] = whole[k + 1, :, 0, :] = curvature[k]
    right = random.normal(size=(num_positions + 1, size))
    expected = np.linalg.solve(whole.reshape(right.size, right.size), right.ravel()).reshape(right.shape)
    shared, own = _solve_arrow(curvature, right[0], right[1:])
    np.testing.assert_allclose(np.vstack([shared, own]), expected, rtol=1e-8, atol=1e-10)


def test_many_small_fits_come_to_what_one_fit_finds() -> None:
    random = np.random.default_rng(9)
    position = random.integers(0, 2, 3000)
    features = np.stack([np.ones(3000), random.normal(size=3000)], axis=1)
    held = random.random(3000) < sigmoid(0.3 + 0.8 * features[:, 1])
    bit_by_bit, at_once = PositionLogistic(2, (0.0, 1.0)), PositionLogistic(2, (0.0, 1.0))
    at_once.observe(features, position, held)
    at_once.fit()
    for part in np.array_split(np.arange(3000), 90):
        bit_by_bit.observe(features[part], position[part], held[part])
    bit_by_bit.fit()
    np.testing.assert_allclose(bit_by_bit.weights, at_once.weights, atol=0.02)


def test_a_margin_and_a_confidence_say_more_than_either() -> None:
    random = np.random.default_rng(11)
    areas = {}
    for kind in ((True, False), (False, True), (True, True)):
        curves = PositionLogistic(1, prior_weights(has_confidence=kind[0], has_margin=kind[1]))
        random = np.random.default_rng(11)
        said, happened = [], []
        for number in range(200):
            confidence, margin = random.random(32), random.exponential(2.0, 32)
            held = random.random(32) < sigmoid(3.0 * (confidence - 0.5) + 1.5 * (np.log1p(margin) - 1.0))
            at = np.zeros(32, np.int64)
            features = token_features(
                at, confidence=confidence if kind[0] else None, margin=margin if kind[1] else None
            )
            if number > 50:
                said.append(curves.chances(features, at))
                happened.append(held)
            curves.observe(features, at, held)
        area = auc(np.concatenate(said), np.concatenate(happened))
        assert area is not None
        areas[kind] = area
    assert areas[True, True] > max(areas[True, False], areas[False, True]) + 0.02


@pytest.mark.parametrize("seed", range(4))
def test_slots_with_a_label_are_those_up_to_the_first_rejection(seed: int) -> None:
    random = np.random.default_rng(seed)
    verified = random.integers(0, 6, 13)
    accepted = np.minimum(verified, random.integers(0, 6, 13))
    expected = [
        (row, position, bool(position < accepted[row]))
        for row in range(13)
        for position in range(verified[row])
        if position <= accepted[row]
    ]
    assert list(zip(*(values.tolist() for values in seen_slots(verified, accepted)), strict=True)) == expected


def test_it_learns_every_position_from_censored_labels() -> None:
    """Rounds are cut at random, and a rejection hides all later positions; curves differ by position."""
    random = np.random.default_rng(2)
    truth = np.array([[-1.0, 2.0], [-0.5, 1.2], [-1.5, 1.0]])
    curves = OneSignal(3, "margin")
    said, stood = [], []
    for number in range(900):
        margin: Floats = random.exponential(4.0, (16, 3))
        holds = random.random((16, 3)) < sigmoid(truth[:, 0] + truth[:, 1] * np.log1p(margin))
        verified = random.integers(1, 4, 16)
        accepted = np.minimum(np.cumprod(holds, axis=1).sum(1), verified)
        if number > 300:
            chances = curves.chances(margin.ravel(), np.tile(np.arange(3), 16)).reshape(16, 3)
            said.append(np.cumprod(chances, axis=1))
            stood.append(np.cumprod(holds, axis=1).astype(bool))
        row, position, held = seen_slots(verified, accepted)
        curves.observe(margin[row, position], position, held)
    survival, happened = np.concatenate(said), np.concatenate(stood)
    for position in range(3):
        assert expected_calibration_error(survival[:, position], happened[:, position]) < 0.03
        area = auc(survival[:, position], happened[:, position])
        assert area is not None
        assert area > 0.65


@pytest.mark.parametrize("seed", range(4))
def test_a_position_leans_on_those_before_it_in_its_draft_and_on_no_other(seed: int) -> None:
    random = np.random.default_rng(seed)
    drafts = [random.normal(size=int(random.integers(1, 7))) for _ in range(9)]
    expected = [(x + 0.1 * sum(draft[:k])) / (1 + 0.1 * k) for draft in drafts for k, x in enumerate(draft.tolist())]
    position = np.concatenate([np.arange(len(draft)) for draft in drafts])
    both = np.stack([np.concatenate(drafts), -np.concatenate(drafts)], axis=1)
    np.testing.assert_allclose(with_predecessors(both, position), np.stack([expected, np.negative(expected)], axis=1))
    assert with_predecessors(np.zeros((0, 1)), np.zeros(0, np.int64)).shape == (0, 1)


def test_products_are_calibrated_where_drafts_differ_in_more_than_their_signals_say() -> None:
    """Half of the rows are easy, half hard, and what is said about a token is blurred."""
    model = ParametricAcceptance((0.75,) * 5, row_spread=0.3, groups=(1.2, -1.2), confidence_noise=1.0, seed=3)
    curves = OneSignal(5, "confidence")
    said, held = [], []
    for number in range(500):
        drafts = model.draft(range(16), np.full(16, 5))
        assert drafts.confidence is not None
        signal, position = np.array(drafts.confidence).ravel(), np.tile(np.arange(5), 16)
        if number > 150:
            said.append(np.cumprod(curves.chances(signal, position).reshape(16, 5), axis=1))
            held.append(drafts.num_held)
        row, at, label = seen_slots(np.full(16, 5), drafts.num_held)
        curves.observe(signal.reshape(16, 5)[row, at], at, label)
    survival, num_held = np.concatenate(said), np.concatenate(held)
    errors = [expected_calibration_error(survival[:, k], num_held > k) for k in range(5)]
    assert max(errors) < 0.05


def test_a_position_without_labels_follows_the_others() -> None:
    random = np.random.default_rng(3)
    curves = OneSignal(4, "margin")
    margin: Floats = random.exponential(3.0, 4000)
    curves.observe(margin, np.zeros(4000, np.int64), random.random(4000) < 0.2)
    curves.curves.fit()
    assert curves.chances(np.full(4, 3.0), np.arange(4))[3] == pytest.approx(0.2, abs=0.08)


def test_a_boasting_head_is_believed_less_the_more_it_is_seen_to_boast() -> None:
    random = np.random.default_rng(4)
    curves = OneSignal(2, "confidence")
    said = np.full(400, 0.9)
    before = curves.chances(said[:1], np.array([0]))[0]
    assert 0.8 < before < 0.9
    curves.observe(said, np.zeros(400, np.int64), random.random(400) < 0.5)
    assert curves.chances(said[:1], np.array([0]))[0] == pytest.approx(0.5, abs=0.06)


def test_what_changes_is_followed_because_old_labels_fade() -> None:
    random = np.random.default_rng(5)
    curves = OneSignal(1, "margin")
    for chance in (0.9, 0.3):
        for _ in range(150):
            margin: Floats = random.exponential(3.0, 64)
            curves.observe(margin, np.zeros(64, np.int64), random.random(64) < chance)
    assert curves.chances(np.array([3.0]), np.array([0]))[0] == pytest.approx(0.36, abs=0.09)


def test_margins_and_confidences_beyond_all_bounds_give_chances() -> None:
    for signal, values in (("margin", [0.0, 1e9, -1.0]), ("confidence", [0.0, 1.0, 0.5])):
        curves = OneSignal(1, signal)
        position = np.zeros(3, np.int64)
        curves.observe(np.array(values), position, np.array([True, False, True]))
        curves.curves.age()
        curves.curves.fit()
        chances = curves.chances(np.array(values), position)
        assert ((chances > 0) & (chances < 1)).all()


def test_drafts_without_a_margin_are_learned_apart_from_those_with_one() -> None:
    """A lookup's word and a head's are different ones: here one boasts, the other is too modest."""
    random = np.random.default_rng(13)
    curves = PositionLogistic(1, prior_weights(has_confidence=True, has_margin=True))
    at, confidence = np.zeros(64, np.int64), np.full(64, 0.7)
    for _ in range(60):
        is_lookup = random.random(64) < 0.5
        features = token_features(at, confidence=confidence, margin=np.where(is_lookup, np.nan, 1.0))
        curves.observe(features, at, random.random(64) < np.where(is_lookup, 0.3, 0.9))
    asked = token_features(at[:2], confidence=confidence[:2], margin=np.array([np.nan, 1.0]))
    np.testing.assert_allclose(curves.chances(asked, at[:2]), [0.3, 0.9], atol=0.05)


def test_exploration_goes_round_all_rows_and_stays_rare() -> None:
    exploration = Exploration(every=4)
    picked = [exploration.next_row(3) for _ in range(48)]
    assert sum(row is not None for row in picked) == 12
    assert {row for row in picked if row is not None} == {0, 1, 2}
    assert Exploration(every=1).next_row(0) is None
