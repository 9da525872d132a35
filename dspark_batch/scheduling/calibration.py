"""How good predicted survivals are: calibration error, ranking and squared error, position by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NUM_BINS = 15


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predictions that lie close together. chance: their mean. frequency: how often the event happened."""

    chance: float
    frequency: float
    num_predictions: int


@dataclass(frozen=True, slots=True)
class PositionQuality:
    """Of the survival predicted for one draft position (0 is the first).

    auc: None where all rounds ended alike. frequency: how often the prefix stood. ece_floor: the calibration error that
    a perfect prediction shows on average over so few rounds. bins: the reliability plot.
    """

    position: int
    num_rounds: int
    frequency: float
    ece: float
    ece_floor: float
    auc: float | None
    brier: float
    bins: tuple[ReliabilityBin, ...]


def survival_quality(
    survival: Floats, *, num_offered: Ints, num_verified: Ints, num_accepted: Ints
) -> tuple[PositionQuality, ...]:
    """Judge predicted survivals by outcomes.

    survival: [N, K], chance that the draft stands up to and with each position. num_offered, num_verified,
    num_accepted: [N]. The outcome at position k < num_offered is known where k was verified, or something before it
    was rejected; other rounds are left out. Those are left out with a bias where the verify length was chosen by the
    survival itself, so measure with full verification. Positions of which nothing is known are not reported.
    """
    found = []
    for position in range(survival.shape[1]):
        known = (num_offered > position) & ((num_verified > position) | (num_accepted < num_verified))
        if known.any():
            found.append(_quality(position, survival[known, position], num_accepted[known] > position))
    return tuple(found)


def expected_calibration_error(chances: Floats, happened: Bools, *, num_bins: int = NUM_BINS) -> float:
    """Mean distance of chance and frequency over bins of equal width, weighted by their predictions (ECE).

    chances: [N] in [0, 1]. happened: [N]. 0 without predictions.
    """
    gaps = np.bincount(_bin_of(chances, num_bins), weights=chances - happened, minlength=num_bins)
    return float(np.abs(gaps).sum() / max(1, len(chances)))


def calibration_error_floor(chances: Floats, *, num_bins: int = NUM_BINS) -> float:
    """The mean ECE of predictions that are exactly right, which is not 0 over a finite number of them.

    A bin's sum of N outcomes is about normal, with the variance of its coins; a mean absolute normal deviate is
    sqrt(2 / pi) standard deviations.
    """
    variance = np.bincount(_bin_of(chances, num_bins), weights=chances * (1 - chances), minlength=num_bins)
    return float(np.sqrt(2 / np.pi * variance).sum() / max(1, len(chances)))


def auc(scores: Floats, happened: Bools) -> float | None:
    """Chance that a prediction that came true scores above one that did not, ties counting half.

    scores, happened: [N]. None where all came true or none did.
    """
    num_true = int(happened.sum())
    num_false = len(happened) - num_true
    if not num_true or not num_false:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((mean_rank[happened].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


def brier(chances: Floats, happened: Bools) -> float:
    """Mean squared distance of chance and outcome, [N] each; 0 without predictions."""
    return float(((chances - happened) ** 2).sum() / max(1, len(chances)))


def reliability(chances: Floats, happened: Bools, *, num_bins: int = NUM_BINS) -> tuple[ReliabilityBin, ...]:
    """The bins of :func:`expected_calibration_error` that are not empty, by rising chance."""
    bins = _bin_of(chances, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    sums = np.bincount(bins, weights=chances, minlength=num_bins)
    hits = np.bincount(bins, weights=happened, minlength=num_bins)
    return tuple(
        ReliabilityBin(float(sums[b] / counts[b]), float(hits[b] / counts[b]), int(counts[b]))
        for b in np.flatnonzero(counts)
    )


def _quality(position: int, chances: Floats, happened: Bools) -> PositionQuality:
    return PositionQuality(
        position=position,
        num_rounds=len(chances),
        frequency=float(happened.mean()),
        ece=expected_calibration_error(chances, happened),
        ece_floor=calibration_error_floor(chances),
        auc=auc(chances, happened),
        brier=brier(chances, happened),
        bins=reliability(chances, happened),
    )


def _bin_of(chances: Floats, num_bins: int) -> Ints:
    bins: Ints = np.minimum((chances * num_bins).astype(np.int64), num_bins - 1)
    return bins
