"""A drafted round of ``schedule: auto``, from its draft lengths to its outcome."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.policies import RoundOutcome
from dspark_batch.scheduling.shadow import labels_of_round
from dspark_batch.scheduling.survival import FlatDraft
from dspark_batch.tensors import DraftBlock

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class DraftedRound:
    """asked: [R] draft lengths. worth: [R] of a token of each row; None where all are alike. is_probe: of a closed
    gate. is_lesson: it is learned from.

    Known once the draft is made: draft, flat, and may_follow: whether emitted tokens are labels for all drafted ones.
    promise: what drafting would save in plain steps, where that is known. price: of a token, where its draft may be
    cut by it.
    """

    asked: Ints
    worth: Floats | None
    is_probe: bool
    is_lesson: bool
    draft: DraftBlock | None = None
    flat: FlatDraft | None = None
    may_follow: bool = False
    promise: float | None = None
    price: float | None = None

    @property
    def is_in_earnest(self) -> bool:
        """Whether it has drafted, and for more than to see what drafting would save."""
        return self.flat is not None and not self.is_probe

    @property
    def num_drafting(self) -> int:
        """Rows that were asked for tokens."""
        return int(np.count_nonzero(self.asked))

    @property
    def longest(self) -> int:
        return int(self.asked.max())

    def value(self, survival: Floats) -> Floats:
        """[N] chance that each drafted token stands, times its worth."""
        assert self.flat is not None, "nothing is drafted yet"
        return survival if self.worth is None else survival * self.worth[self.flat.row]

    def labels(self, outcome: RoundOutcome, *, may_follow: bool) -> tuple[Ints, Ints]:
        """[R] drafted positions whose outcome the round showed, and how many of them held."""
        assert self.draft is not None, "nothing is drafted yet"
        assert self.flat is not None, "nothing is drafted yet"
        return labels_of_round(self.draft, self.flat, outcome, may_follow=may_follow)
