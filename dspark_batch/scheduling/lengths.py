"""Draft lengths before the draft is made, from each row's acceptance history and the cost of drafting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import DraftCost
from dspark_batch.scheduling.planner import StepSeconds, admit
from dspark_batch.scheduling.survival import positions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_ASK_AGAIN_EVERY = 32

CHEAP_DRAFT = 0.03
"""Share of a plain step below which a difference in drafting time is not worth a thought."""


def costs_by_token(draft_cost: DraftCost, *, num_rows: int, longest: int, plain_s: float) -> bool:
    """Whether shorter drafts are cheaper to make, as those of a draft model are."""
    saved_s = draft_cost.seconds(num_rows, longest) - draft_cost.seconds(num_rows, 1)
    return saved_s > CHEAP_DRAFT * plain_s


def best_lengths(
    limits: Ints,
    value: Floats,
    *,
    offered: Floats,
    step_seconds: StepSeconds,
    plain_s: float,
    draft_cost: DraftCost,
) -> tuple[Ints, float]:
    """[R] lengths with the best expected tokens per second, all 0 where plain decoding has it; and what they save, as a
    factor on the rate of plain decoding, 1 for nothing.

    limits: [R]. value: [R, K] survival by row and position, times the worth of the row's tokens. offered: [K] how often
    the drafter has a token for a position. Several longest lengths are tried where drafting costs by the token.
    """
    num_rows, longest = len(limits), int(limits.max(initial=0))
    is_by_token = costs_by_token(draft_cost, num_rows=num_rows, longest=longest, plain_s=plain_s)
    # Plain decoding has no draft to pay for.
    plain_rate = num_rows / plain_s
    best_rate, best = plain_rate, np.zeros_like(limits)
    while longest:
        allowed = np.minimum(limits, longest)
        row, position = np.repeat(np.arange(num_rows), allowed), positions(allowed)
        num_drafting = int(np.count_nonzero(allowed))
        for _ in range(2):
            admitted = admit(
                value[row, position],
                num_rows=num_rows,
                step_seconds=step_seconds,
                draft_s=draft_cost.seconds(num_drafting, longest),
                offered=offered[position],
            )
            lengths: Ints = np.bincount(row[admitted.mask], minlength=num_rows)
            # Rows that get nothing are not drafted for: the draft is cheaper, and fewer tokens are worth it.
            if np.count_nonzero(lengths) in (0, num_drafting):
                break
            num_drafting = int(np.count_nonzero(lengths))
        if admitted.tokens_per_s > best_rate:
            best_rate, best = admitted.tokens_per_s, lengths
        if not is_by_token:
            break
        longest = min(longest // 2, int(lengths.max(initial=0)))
    return best, best_rate / plain_rate


def row_seconds(draft_cost: DraftCost, *, num_rows: int, longest: int) -> float:
    """What one row more adds to a drafting call, at this number of rows."""
    half = num_rows // 2
    if not half:
        return 0.0
    return (draft_cost.seconds(num_rows, longest) - draft_cost.seconds(half, longest)) / (num_rows - half)


def rows_worth_drafting(value: Floats, *, plain_s: float, row_s: float, token_s: float) -> Bools:
    """[R] whether a row's expected accepted tokens are worth the ``row_s`` seconds that it adds to the draft.

    value: [R, K] survival, times the worth of the row's tokens. A token is worth what it takes to decode it plainly,
    less the ``token_s`` seconds of its verification.
    """
    gains = np.maximum(0.0, value * plain_s / len(value) - token_s).sum(1)
    worth: Bools = gains > row_s
    return worth


class AskedRows:
    """Which rows are asked for drafts: those that are worth it, and the others now and then."""

    def __init__(self) -> None:
        self._num_choices = 0

    def choose(self, handles: Sequence[int], worth: Bools) -> Bools:
        """[R] the rows whose drafts are worth it, and those whose turn it is; call once per choice."""
        self._num_choices += 1
        chosen: Bools = worth | ((np.array(handles) + self._num_choices) % _ASK_AGAIN_EVERY == 0)
        return chosen
