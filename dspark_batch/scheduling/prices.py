"""What a round costs and what drafting in it is worth, in seconds and in plain steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import DraftCost, Seen, StepCost
from dspark_batch.scheduling.planner import StepSeconds, admit
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Prices:
    """The learned costs, asked about rounds. Without a cost of steps nothing may be asked."""

    def __init__(self, cost: StepCost | None, draft_cost: DraftCost) -> None:
        self._step_cost = cost
        self._draft_cost = draft_cost

    def observe(self, load: RoundLoad, outcome: RoundOutcome, *, is_lesson: bool) -> None:
        """The time of a step: of one that is a lesson, or of a size that was not as expected, or never seen."""
        cost, num_tokens, num_rows = self._cost, outcome.num_step_tokens, len(load.handles)
        is_lesson |= cost.seen(num_tokens, num_rows=num_rows) is not Seen.AS_EXPECTED
        # Prompt tokens need no logits: a step that is mostly prompt would look too cheap for its size.
        if is_lesson and not outcome.is_mostly_prompt:
            cost.observe(num_tokens, outcome.step_s, num_rows=num_rows, context_tokens=load.context_tokens)

    def plain_s(self, load: RoundLoad) -> float:
        """Seconds of a step that decodes the round's rows plainly."""
        num_rows = len(load.handles)
        return self._cost.at([num_rows], num_rows=num_rows, context_tokens=load.context_tokens)[0]

    def seen(self, load: RoundLoad, num_extra: int) -> Seen:
        """The round's step with so many drafted tokens in it."""
        num_rows = len(load.handles)
        return self._cost.seen(num_rows + load.num_prefill_tokens + num_extra, num_rows=num_rows)

    def share_of_rows(self, load: RoundLoad) -> float:
        """The share of a plain step that grows with its rows."""
        return self._cost.share_of_rows(num_rows=len(load.handles), context_tokens=load.context_tokens)

    def token_s(self, load: RoundLoad, num_extra: int) -> float:
        """Seconds that one of so many drafted tokens adds to the step, on average."""
        low_s, high_s = self.step_seconds(load)(np.array([0.0, num_extra])).tolist()
        return float(high_s - low_s) / num_extra

    def step_seconds(self, load: RoundLoad) -> StepSeconds:
        """Seconds of the round's step by the number of drafted tokens in it."""
        cost, num_rows, context_tokens = self._cost, len(load.handles), load.context_tokens
        base = num_rows + load.num_prefill_tokens

        def step_seconds(num_extra: Floats) -> Floats:
            if base == num_rows:
                return cost.seconds(num_rows + num_extra, num_rows=num_rows, context_tokens=context_tokens)
            at = np.concatenate([[float(num_rows), float(base)], base + num_extra])
            seconds = cost.seconds(at, num_rows=num_rows, context_tokens=context_tokens)
            # Prompt tokens of the same step are paid for anyway; they only move the place on the curve.
            moved: Floats = seconds[2:] - seconds[1] + seconds[0]
            return moved

        return step_seconds

    def promise(self, load: RoundLoad, asked: Ints, value: Floats, *, worth: Floats | None) -> float:
        """What drafting would save, in plain steps, if all rows drafted as those that were asked did; or, where rows
        have a ``worth`` of their own, if only those did. value: [N] survival of their tokens, times that."""
        num_rows, num_asked, is_of_all = len(load.handles), int(np.count_nonzero(asked)), worth is None
        stands_for = num_rows / num_asked if is_of_all else 1.0
        draft_s = self._draft_cost.seconds(num_rows if is_of_all else num_asked, int(asked.max()))
        step_seconds = self.step_seconds(load)
        admitted = admit(
            value,
            num_rows=num_rows,
            step_seconds=step_seconds,
            draft_s=draft_s,
            offered=np.full(len(value), stands_for),
        )
        before_s, after_s = step_seconds(np.array([0.0, admitted.num_tokens])).tolist()
        return float(admitted.num_accepted / num_rows - (after_s - before_s + draft_s) / before_s)

    def saved(self, load: RoundLoad, asked: Ints, outcome: RoundOutcome, worth: Floats | None) -> float:
        """The share of a plain step that a round saved: its accepted tokens' worth, less the extra time. worth: [R] of
        a token of each row; None where all are alike."""
        num_rows = len(load.handles)
        num_extra = sum(outcome.num_verified)
        base = outcome.num_step_tokens - num_extra
        plain_s, before_s, after_s = self._cost.at(
            [num_rows, base, base + num_extra], num_rows=num_rows, context_tokens=load.context_tokens
        )
        # The step's own time, so that a wrong curve cannot keep drafting up; within bounds, against hiccups. Beside
        # many prompt tokens drafted ones are lost in its noise.
        is_telling = num_extra and not outcome.is_mostly_prompt
        took_s = min(max(outcome.step_s, 0.5 * after_s), 2.0 * after_s) if is_telling else after_s
        drafted_s = self._draft_cost.seconds(int(np.count_nonzero(asked)), int(asked.max()))
        gained = sum(outcome.num_accepted) if worth is None else float(worth @ outcome.num_accepted)
        return float(gained / num_rows - (took_s - before_s + drafted_s) / plain_s)

    @property
    def _cost(self) -> StepCost:
        assert self._step_cost is not None, "nothing is planned or judged without costs"
        return self._step_cost
