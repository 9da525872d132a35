"""Sequential temperature scaling on rounds whose true chances are known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.training.calibrate import calibrate, fit_temperatures, observed
from dspark_batch.training.recording import DraftedRound

TRUE = (2.0, 0.5, 1.5)


def simulated(num_rounds: int, *, seed: int = 0) -> list[DraftedRound]:
    """Rounds whose stated logits are the true ones times ``TRUE``: over- and under-confident by slot."""
    random = np.random.default_rng(seed)
    logits = random.normal(0.8, 1.2, (num_rounds, 3))
    stands = random.random((num_rounds, 3)) < 1 / (1 + np.exp(-logits))
    accepted = np.cumprod(stands, axis=1).sum(1)
    stated = 1 / (1 + np.exp(-logits * TRUE))
    return [
        DraftedRound(3, int(a), min(int(a) + 1, 3), tuple(row))
        for a, row in zip(accepted, stated.tolist(), strict=True)
    ]


def test_the_temperatures_that_distorted_the_confidences_are_found() -> None:
    found = fit_temperatures(observed(simulated(40_000), num_slots=3))
    assert found == pytest.approx(TRUE, rel=0.25)


def test_calibration_lowers_the_error_on_rounds_that_it_did_not_see() -> None:
    report = calibrate(simulated(20_000), num_slots=3)
    assert report is not None
    assert report.num_rounds == 20_000
    assert all(after < 0.5 * before for before, after in zip(report.ece_before, report.ece_after, strict=True))
    assert max(report.ece_after) < 0.02
    assert all(area is not None and area > 0.6 for area in report.auc_after)


def test_rounds_cut_short_by_the_rows_end_are_left_out_but_early_rejections_count() -> None:
    confidence = (0.5, 0.5, 0.5)
    rounds = [
        DraftedRound(3, 3, 3, confidence),
        DraftedRound(3, 2, 2, confidence),  # the row ended after two accepted tokens
        DraftedRound(3, 0, 1, confidence),
        DraftedRound(2, 2, 2, confidence[:2]),
    ]
    assert observed(rounds, num_slots=3).accepted.tolist() == [3, 0]


def test_too_few_rounds_give_no_calibration() -> None:
    assert calibrate(simulated(20), num_slots=3) is None
