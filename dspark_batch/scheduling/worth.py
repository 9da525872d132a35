"""What a token of each row is worth: all the same while rows wait, but a draining batch ends with its longest rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

Floats = NDArray[np.float64]

_LEAST_SHARE = 0.1
_NEARLY_ALIKE = 1.05
_LEAST = 0.05
"""Never nothing: survivals are compared with prices divided by it."""


class RowWorth:
    """Worth of tokens by row, in tokens of plain decoding.

    While rows wait, a place is worth the same whoever has it. Afterwards one row less makes a step little cheaper, so
    what counts is when the longest rows end. Any token is worth what one row more costs a step. What a step costs
    beyond that, its weights above all, is shared by the rows with more than half as many tokens to go as the longest,
    by their lead: the others would end before it even if only it was drafted for. Lengths are known as limits; they
    count as far as rows of this job have ended at theirs.
    """

    def __init__(self) -> None:
        self.num_finished = 0
        self._num_at_limit = 0

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """Call after every round."""
        left = load.num_left
        if outcome.emitted is None or not left or min(left) > max(map(len, outcome.emitted)):
            return
        self._num_at_limit += sum(len(e) >= most for e, most in zip(outcome.emitted, left, strict=True))

    @property
    def share_at_limit(self) -> float:
        """Of the rows that ended, those that ended at their limit; half before the first one did."""
        return min(1.0, (self._num_at_limit + 1) / (self.num_finished + 2))

    def may_differ(self, load: RoundLoad) -> bool:
        """Whether some rows may be worth more than others. Rows that still compute their prompt are the longest, and
        not among these."""
        is_draining = not load.num_queued and not load.num_prefill_tokens and len(load.num_left) > 1
        return is_draining and self.share_at_limit > _LEAST_SHARE

    def of_rows(self, num_left: Sequence[int], *, share_of_rows: float) -> Floats | None:
        """[R] with a mean of 1, a little more where the least is raised, or None where all are worth about the same.

        share_of_rows: of a plain step's time, what grows with the rows.
        """
        left = np.array(num_left, np.float64)
        if _NEARLY_ALIKE * left.min() >= left.max():
            return None
        # Above half of the longest; that one has a lead of 1.
        lead = np.maximum(0.0, 2.0 * left / left.max() - 1.0)
        worth = share_of_rows + (1.0 - share_of_rows) * len(left) * lead / lead.sum()
        share = self.share_at_limit
        mixed: Floats = share * worth + (1.0 - share)
        return np.maximum(mixed, _LEAST)
