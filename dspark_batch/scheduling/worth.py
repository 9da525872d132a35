"""What a token of each row is worth: all the same while rows wait, but a draining batch ends with its longest rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

Floats = NDArray[np.float64]

_LEAST_SHARE = 0.1
_NEARLY_ALIKE = 1.05
_LEAST = 0.05


class RowWorth:
    """Worth of tokens by row, in tokens of plain decoding.

    While rows wait, a place is worth the same whoever has it. Afterwards one row less makes a step little cheaper, so
    what counts is when the longest rows end. Any token is worth what one row more costs a step. What a step costs
    beyond that, its weights above all, is shared by the rows with more than half as many tokens to go as the longest,
    by their lead: the others would end before it even if only it was drafted for. Lengths are known as limits; they
    count as far as rows of this job have ended at theirs.
    """

    def __init__(self) -> None:
        self._num_finished = 0
        self._num_at_limit = 0

    def note_finished(self, count: int) -> None:
        self._num_finished += count

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """Call after every round."""
        if outcome.emitted is None or not load.limits or min(load.limits) > max(map(len, outcome.emitted)):
            return
        self._num_at_limit += sum(len(e) > limit for e, limit in zip(outcome.emitted, load.limits, strict=True))

    @property
    def share_at_limit(self) -> float:
        """Of the rows that ended, those that ended at their limit; all before the first one did."""
        return min(1.0, (self._num_at_limit + 1) / (self._num_finished + 1))

    def differs(self, load: RoundLoad) -> bool:
        """Whether some rows may be worth more than others."""
        return not load.num_queued and len(load.handles) > 1 and self.share_at_limit > _LEAST_SHARE

    def of_rows(self, load: RoundLoad, *, one_s: float, all_s: float) -> Floats | None:
        """[R] with a mean of 1, or None where all are worth about the same.

        one_s, all_s: seconds of a plain step of one row, and of all.
        """
        if not self.differs(load):
            return None
        num_rows, left = len(load.handles), np.array(load.limits, np.float64) + 1.0
        if _NEARLY_ALIKE * left.min() >= left.max():
            return None
        # Above half of the longest; that one has a lead of 1.
        lead = np.maximum(0.0, 2.0 * left / left.max() - 1.0)
        row_s = max(0.0, (all_s - one_s) / (num_rows - 1))
        of_any = min(1.0, num_rows * row_s / (one_s + (num_rows - 1) * row_s))
        worth = of_any + (1.0 - of_any) * num_rows * lead / lead.sum()
        share = self.share_at_limit
        mixed: Floats = share * worth + (1.0 - share)
        return np.maximum(mixed, _LEAST)
