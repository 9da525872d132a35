"""Acceptance models: laws of the parametric one, faithful replay of traces."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.errors import InputError
from dspark_batch.scheduling.calibration import auc, expected_calibration_error
from dspark_batch.scheduling.simulator.acceptance import ParametricAcceptance, TraceAcceptance
from dspark_batch.scheduling.traces import RecordedRound


def recorded(offered: list[int], accepted: list[int], *, verified: list[int] | None = None) -> RecordedRound:
    return RecordedRound(
        handles=tuple(range(10, 10 + len(offered))),
        num_offered=tuple(offered),
        num_verified=tuple(verified or offered),
        num_accepted=tuple(accepted),
        num_step_tokens=1,
        num_prefill_tokens=0,
        draft_s=0.0,
        step_s=0.0,
        confidence=tuple(tuple(k / 10 for k in range(1, n + 1)) for n in offered),
    )


def test_without_spread_the_chances_are_those_given() -> None:
    chances = (0.9, 0.5, 0.8)
    model = ParametricAcceptance(chances, row_spread=0, round_spread=0, token_spread=0, confidence_noise=0.0)
    drafts = model.draft([0] * 20_000, np.full(20_000, 3))
    stood = [float((drafts.num_held > k).mean()) for k in range(3)]
    assert stood == pytest.approx(np.cumprod(chances).tolist(), abs=0.015)
    assert drafts.confidence is not None
    assert drafts.confidence[0] == pytest.approx(chances)


def test_drafts_are_as_long_as_asked_and_never_hold_more() -> None:
    random = np.random.default_rng(1)
    model = ParametricAcceptance((0.8,) * 5, confidence_noise=None)
    lengths = random.integers(0, 9, 500)
    drafts = model.draft(range(500), lengths)
    assert (drafts.num_offered == np.minimum(lengths, 5)).all()
    assert (drafts.num_held <= drafts.num_offered).all()
    assert drafts.confidence is None


def test_confidences_rank_and_without_noise_they_are_calibrated() -> None:
    def first(noise: float) -> tuple[float, float]:
        model = ParametricAcceptance((0.7,) * 3, confidence_noise=noise)
        numbers, lengths = [number % 300 for number in range(20_000)], np.full(20_000, 1)
        drafts = model.draft(numbers, lengths)
        assert drafts.confidence is not None
        said, stood = np.array([row[0] for row in drafts.confidence]), drafts.num_held > 0
        area = auc(said, stood)
        assert area is not None
        return area, expected_calibration_error(said, stood)

    sharp, blurred = first(0.0), first(2.0)
    assert sharp[0] > blurred[0] + 0.03 > 0.58
    assert sharp[1] < 0.015 < blurred[1]


def test_a_row_is_equally_easy_under_every_schedule_and_groups_differ() -> None:
    first = ParametricAcceptance((0.5,) * 4, groups=(2.0, -2.0), seed=3)
    second = ParametricAcceptance((0.5,) * 4, groups=(2.0, -2.0), seed=3)
    first.draft([5, 6], np.array([4, 4]))
    held = [np.zeros(2), np.zeros(2)]
    for _ in range(400):
        held[0] += first.draft([0, 1], np.array([4, 4])).num_held
        held[1] += second.draft([1, 0], np.array([4, 4])).num_held[::-1]
    assert held[0][0] > 2 * held[0][1]
    np.testing.assert_allclose(held[0], held[1], rtol=0.25, atol=40)


def test_a_trace_is_replayed_row_by_row_in_order_and_again() -> None:
    model = TraceAcceptance([recorded([3, 2], [3, 0]), recorded([3, 0], [1, 0]), recorded([0, 3], [0, 2])])
    assert model.num_positions == 3
    first = model.draft([0, 1], np.array([3, 3]))
    assert (first.num_offered.tolist(), first.num_held.tolist()) == ([3, 2], [3, 0])
    second = model.draft([0, 1, 2], np.array([1, 0, 2]))
    assert (second.num_offered.tolist(), second.num_held.tolist()) == ([1, 0, 2], [1, 0, 2])
    assert second.confidence == [[0.1], [], [0.1, 0.2]]
    third = model.draft([0, 1], np.array([3, 3]))
    assert (third.num_offered.tolist(), third.num_held.tolist()) == ([3, 3], [3, 2])


def test_traces_that_cannot_be_replayed_are_refused() -> None:
    with pytest.raises(InputError, match="no drafts"):
        TraceAcceptance([recorded([0], [0])])
    with pytest.raises(InputError, match="schedule=fixed"):
        TraceAcceptance([recorded([4], [2], verified=[2])])
