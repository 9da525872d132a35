"""Recorded rounds once more through the estimators: each predicts a round's survival before it sees the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.calibration import PositionQuality, survival_quality
from dspark_batch.scheduling.estimator import AcceptanceHistory, seen_slots
from dspark_batch.scheduling.logistic import PositionLogistic, prior_weights, token_features
from dspark_batch.scheduling.traces import RecordedRound

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class SurvivalEstimator(Protocol):
    """Predicts, then learns. Both see only those rows of a round that drafted something."""

    def survival(self, drafts: Drafts) -> Floats:
        """[R, K], any number where a row offered fewer than K tokens."""
        ...

    def observe(self, drafts: Drafts, num_verified: Ints, num_accepted: Ints) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Drafts:
    """The rows of a round that drafted something. confidence, margin: [R, K], 0 past a row's draft, or None."""

    handles: tuple[int, ...]
    confidence: Floats | None
    margin: Floats | None


class History:
    """``AcceptanceHistory``: by position, job and row; looks at no signal."""

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._history = AcceptanceHistory(num_positions)

    def survival(self, drafts: Drafts) -> Floats:
        return self._history.survival(drafts.handles, self._num_positions)

    def observe(self, drafts: Drafts, num_verified: Ints, num_accepted: Ints) -> None:
        self._history.observe(drafts.handles, num_verified, num_accepted)


class Stated:
    """The drafter's confidences as they are: the head with whatever temperatures its checkpoint has."""

    def survival(self, drafts: Drafts) -> Floats:
        assert drafts.confidence is not None, "chosen for drafters with a confidence"
        out: Floats = np.cumprod(drafts.confidence, axis=1).astype(np.float64)
        return out

    def observe(self, drafts: Drafts, num_verified: Ints, num_accepted: Ints) -> None:
        """Nothing to learn."""


class Logistic:
    """``PositionLogistic`` over confidences, margins or both."""

    def __init__(self, num_positions: int, *, has_confidence: bool, has_margin: bool) -> None:
        self._has_confidence, self._has_margin = has_confidence, has_margin
        prior = prior_weights(has_confidence=has_confidence, has_margin=has_margin)
        self._curves = PositionLogistic(num_positions, prior)

    def survival(self, drafts: Drafts) -> Floats:
        features, position = self._features(drafts)
        chances = self._curves.chances(features, position).reshape(len(drafts.handles), -1)
        out: Floats = np.cumprod(chances, axis=1).astype(np.float64)
        return out

    def observe(self, drafts: Drafts, num_verified: Ints, num_accepted: Ints) -> None:
        row, position, held = seen_slots(num_verified, num_accepted)
        features, all_positions = self._features(drafts)
        num_positions = len(all_positions) // len(drafts.handles)
        self._curves.observe(features[row * num_positions + position], position, held)

    def _features(self, drafts: Drafts) -> tuple[Floats, Ints]:
        said = drafts.confidence if self._has_confidence else drafts.margin
        assert said is not None, "chosen for drafters that say it"
        position: Ints = np.tile(np.arange(said.shape[1]), len(said))
        confidence = drafts.confidence.ravel() if self._has_confidence and drafts.confidence is not None else None
        margin = drafts.margin.ravel() if self._has_margin and drafts.margin is not None else None
        return token_features(position, confidence=confidence, margin=margin), position


@dataclass(frozen=True, slots=True)
class EstimatorQuality:
    """name: of the estimator. positions: its quality at each, over the rounds after the warm-up."""

    name: str
    num_labels: int
    positions: tuple[PositionQuality, ...]


def replay_estimators(rounds: Sequence[RecordedRound], *, warm_up: float = 0.3) -> tuple[EstimatorQuality, ...]:
    """The quality of every estimator that the recorded signals allow.

    warm_up: share of the rounds, the first ones, whose predictions do not count. Every counted prediction is made
    before its outcome was shown, so they are held out even though the estimators go on learning.
    """
    num_positions = max((max(r.num_offered, default=0) for r in rounds), default=0)
    if not num_positions:
        return ()
    has_confidence = any(r.confidence is not None for r in rounds)
    has_margin = any(r.margin is not None for r in rounds)
    candidates: list[tuple[str, SurvivalEstimator]] = [("history", History(num_positions))]
    if has_confidence:
        candidates.append(("confidence as stated", Stated()))
    for name, uses in {
        "confidence, logistic": (True, False),
        "margin, logistic": (False, True),
        "both, logistic": (True, True),
    }.items():
        if (has_confidence or not uses[0]) and (has_margin or not uses[1]):
            candidates.append((name, Logistic(num_positions, has_confidence=uses[0], has_margin=uses[1])))
    return tuple(
        _replay(name, estimator, rounds, num_positions=num_positions, warm_up=warm_up) for name, estimator in candidates
    )


def _replay(
    name: str,
    estimator: SurvivalEstimator,
    rounds: Sequence[RecordedRound],
    *,
    num_positions: int,
    warm_up: float,
) -> EstimatorQuality:
    survivals, outcomes = [], []
    num_skipped = int(len(rounds) * warm_up)
    for number, recorded in enumerate(rounds):
        rows = [r for r, offered in enumerate(recorded.num_offered) if offered]
        if not rows:
            continue
        drafts = Drafts(
            tuple(recorded.handles[r] for r in rows),
            _dense(recorded.confidence, rows, num_positions),
            _dense(recorded.margin, rows, num_positions),
        )
        counts = (recorded.num_offered, recorded.num_verified, recorded.num_accepted)
        outcome = np.array([[numbers[r] for r in rows] for numbers in counts], np.int64)
        if number >= num_skipped:
            survivals.append(estimator.survival(drafts))
            outcomes.append(outcome)
        estimator.observe(drafts, outcome[1], outcome[2])
    if not survivals:
        return EstimatorQuality(name, 0, ())
    offered, verified, accepted = np.concatenate(outcomes, axis=1)
    quality = survival_quality(
        np.concatenate(survivals), num_offered=offered, num_verified=verified, num_accepted=accepted
    )
    return EstimatorQuality(name, int(np.minimum(accepted + 1, verified).sum()), quality)


def _dense(said: Sequence[Sequence[float]] | None, rows: Sequence[int], num_positions: int) -> Floats | None:
    """[R, K] of the chosen rows, 0 past a row's draft."""
    if said is None:
        return None
    out: Floats = np.zeros((len(rows), num_positions))
    for i, r in enumerate(rows):
        out[i, : len(said[r])] = said[r]
    return out
