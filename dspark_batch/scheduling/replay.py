"""Recorded rounds once more through the estimators: each predicts a round's survival before it sees the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.calibration import PositionQuality, survival_quality
from dspark_batch.scheduling.estimator import AcceptanceHistory, seen_slots
from dspark_batch.scheduling.logistic import CONFIDENCE, MARGIN, PositionLogistic, Signal
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
    """The rows of a round that drafted something. signals: [R, K], 0 past a row's draft; what the drafter said."""

    handles: tuple[int, ...]
    signals: Floats


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
        out: Floats = np.cumprod(drafts.signals, axis=1).astype(np.float64)
        return out

    def observe(self, drafts: Drafts, num_verified: Ints, num_accepted: Ints) -> None:
        """Nothing to learn."""


class Logistic:
    """``PositionLogistic`` over margins or confidences."""

    def __init__(self, num_positions: int, signal: Signal) -> None:
        self._curves = PositionLogistic(num_positions, signal)

    def survival(self, drafts: Drafts) -> Floats:
        shape = drafts.signals.shape
        position = np.broadcast_to(np.arange(shape[1]), shape).ravel()
        chances = self._curves.chances(drafts.signals.ravel(), position).reshape(shape)
        out: Floats = np.cumprod(chances, axis=1).astype(np.float64)
        return out

    def observe(self, drafts: Drafts, num_verified: Ints, num_accepted: Ints) -> None:
        row, position, held = seen_slots(num_verified, num_accepted)
        self._curves.observe(drafts.signals[row, position], position, held)


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
    candidates: list[tuple[str, str | None, SurvivalEstimator]] = [("history", None, History(num_positions))]
    if any(r.confidence is not None for r in rounds):
        candidates += [
            ("confidence as stated", "confidence", Stated()),
            ("confidence, logistic", "confidence", Logistic(num_positions, CONFIDENCE)),
        ]
    if any(r.margin is not None for r in rounds):
        candidates.append(("margin, logistic", "margin", Logistic(num_positions, MARGIN)))
    return tuple(
        _replay(name, signal, estimator, rounds, num_positions=num_positions, warm_up=warm_up)
        for name, signal, estimator in candidates
    )


def _replay(
    name: str,
    signal: str | None,
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
        values = getattr(recorded, signal) if signal else None
        signals = np.zeros((len(rows), num_positions))
        if values is not None:
            for i, r in enumerate(rows):
                signals[i, : len(values[r])] = values[r]
        drafts = Drafts(tuple(recorded.handles[r] for r in rows), signals)
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
