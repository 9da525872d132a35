"""What a draft came to, read off the tokens that its row committed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.tensors import DraftBlock
from dspark_batch.training.evaluate import by_position
from dspark_batch.training.recording import DraftedRound, RecordingDrafter


class Scripted(NoDrafter):
    """Always drafts 1, 2, 3 with confidences."""

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        return DraftBlock([[1, 2, 3][:n] for n in max_tokens], confidence=[[0.9, 0.8, 0.7][:n] for n in max_tokens])


@pytest.mark.parametrize(
    ("committed", "accepted", "known"),
    [([1, 2, 3, 9], 3, 3), ([1, 7], 1, 2), ([5], 0, 1), ([1, 2], 2, 2), ([1, 2, 3], 3, 3)],
)
def test_a_draft_is_compared_with_what_follows(committed: list[int], accepted: int, known: int) -> None:
    tokens = [50, 51]
    drafter = RecordingDrafter(Scripted())
    row = DraftRow(0, 0, SamplingParams(), tokens, 1)
    drafter.add(row)
    drafter.propose([row], [3])
    tokens += committed
    drafter.remove(row, finished=True)
    assert drafter.rounds == [DraftedRound(3, accepted, known, (0.9, 0.8, 0.7))]


def test_each_round_is_closed_by_the_next_and_abandoned_rows_are_not_counted() -> None:
    tokens = [50, 51]
    drafter = RecordingDrafter(Scripted())
    row = DraftRow(0, 0, SamplingParams(), tokens, 1)
    drafter.add(row)
    drafter.propose([row], [2])
    tokens += [1, 9]
    drafter.propose([row], [0])
    tokens += [4]
    drafter.propose([row], [3])
    drafter.remove(row, finished=False)
    assert drafter.rounds == [DraftedRound(2, 1, 2, (0.9, 0.8))]


def test_shares_by_position_leave_out_what_is_not_known() -> None:
    rounds = [DraftedRound(3, 3, 3), DraftedRound(3, 1, 2), DraftedRound(3, 2, 2), DraftedRound(1, 1, 1)]
    assert by_position(rounds, num_slots=3) == pytest.approx((1.0, 2 / 3, 1 / 2))
