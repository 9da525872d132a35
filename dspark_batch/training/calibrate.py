"""Sequential temperature scaling (STS): confidences whose running product is the chance that a draft prefix stands.

Source: arXiv 2607.05147, calibration: one temperature per slot, fitted left to right on held-out rounds, each
minimising the expected calibration error (ECE) of the product so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.calibration import NUM_BINS, auc
from dspark_batch.scheduling.calibration import expected_calibration_error as ece
from dspark_batch.training.recording import DraftedRound

Floats = NDArray[np.float64]
_GRID: Floats = np.exp(np.linspace(np.log(1 / 8), np.log(8), 97))
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """ECE and area under the ROC curve of the running products, per slot, on rounds that the fit did not see.

    auc does not change by calibrating one slot alone; it can by the others' weight in the product. None where all
    rounds ended alike.
    """

    temperatures: tuple[float, ...]
    num_rounds: int
    ece_before: tuple[float, ...]
    ece_after: tuple[float, ...]
    auc_before: tuple[float | None, ...]
    auc_after: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Whole drafts with known outcomes. logits: [N, K] of the confidences. accepted: [N] leading tokens that stand."""

    logits: Floats
    accepted: NDArray[np.int64]

    def part(self, index: slice) -> Observed:
        return Observed(self.logits[index], self.accepted[index])


def observed(rounds: Sequence[DraftedRound], *, num_slots: int) -> Observed:
    """Rounds that drafted all slots and whose outcome is known for each."""
    whole = [
        r
        for r in rounds
        if len(r.confidence) == num_slots and (r.num_known == num_slots or r.num_accepted < r.num_known)
    ]
    chances = np.array([r.confidence for r in whole], dtype=np.float64).reshape(-1, num_slots)
    chances = chances.clip(_EPSILON, 1 - _EPSILON)
    logits = np.log(chances) - np.log1p(-chances)
    return Observed(logits, np.array([r.num_accepted for r in whole], dtype=np.int64))


def fit_temperatures(data: Observed) -> tuple[float, ...]:
    """One temperature per slot, from a grid over 1/8 .. 8; ties go to the one nearest to 1."""
    survival: Floats = np.ones(len(data.accepted), dtype=np.float64)
    found = []
    grid = _GRID[np.argsort(np.abs(np.log(_GRID)), kind="stable")]
    for slot in range(data.logits.shape[1]):
        stands = data.accepted > slot
        errors = [ece(survival * _sigmoid(data.logits[:, slot] / t), stands) for t in grid]
        best = float(grid[int(np.argmin(errors))])
        survival = survival * _sigmoid(data.logits[:, slot] / best)
        found.append(best)
    return tuple(found)


def calibrate(rounds: Sequence[DraftedRound], *, num_slots: int) -> CalibrationReport | None:
    """Fit on every other round, report on the rest. None where there are too few rounds to say anything."""
    data = observed(rounds, num_slots=num_slots)
    fitted, held_out = data.part(slice(0, None, 2)), data.part(slice(1, None, 2))
    if len(held_out.accepted) < NUM_BINS:
        return None
    temperatures = fit_temperatures(fitted)
    before, after = (survival_of(held_out, t) for t in ((1.0,) * num_slots, temperatures))
    stands = [held_out.accepted > slot for slot in range(num_slots)]
    return CalibrationReport(
        temperatures=temperatures,
        num_rounds=len(data.accepted),
        ece_before=tuple(ece(before[:, k], stands[k]) for k in range(num_slots)),
        ece_after=tuple(ece(after[:, k], stands[k]) for k in range(num_slots)),
        auc_before=tuple(auc(before[:, k], stands[k]) for k in range(num_slots)),
        auc_after=tuple(auc(after[:, k], stands[k]) for k in range(num_slots)),
    )


def survival_of(data: Observed, temperatures: Sequence[float]) -> Floats:
    """[N, K], running products of the scaled confidences."""
    chances = _sigmoid(data.logits / np.asarray(temperatures))
    return np.asarray(chances.cumprod(axis=1), dtype=np.float64)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)), dtype=np.float64)
