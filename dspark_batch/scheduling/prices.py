"""What a round costs and what drafting in it is worth, in seconds and in plain steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import DraftCost, StepCost
from dspark_batch.scheduling.planner import StepSeconds, admit
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Prices:
    """The learned costs, asked about rounds. Without a cost of steps nothing may be asked."""

    def __init__(self, cost: StepCost | None, draft_cost: DraftCost) -> None:
        self._step_cost = cost
        self._draft_cost = draft_cost

    def plain_s(self, load: RoundLoad) -> float:
        """Seconds of a step that decodes the round's rows plainly."""
        num_rows = len(load.handles)
        return self._cost.at([num_rows], num_rows=num_rows, context_tokens=load.context_tokens)[0]

    def one_s(self, load: RoundLoad) -> float:
        """Seconds of a step that decodes one such row plainly."""
        return self._cost.at([1], num_rows=1, context_tokens=load.context_tokens)[0]

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

    def promise(self, load: RoundLoad, asked: Ints, survival: Floats) -> float:
        """What drafting would save, in plain steps, if all rows drafted as those that were asked did. survival: [N] of
        their tokens, times their worth."""
        num_rows = len(load.handles)
        stands_for = num_rows / int(np.count_nonzero(asked))
        draft_s = self._draft_cost.seconds(num_rows, int(asked.max()))
        step_seconds = self.step_seconds(load)
        admitted = admit(
            survival,
            num_rows=num_rows,
            step_seconds=step_seconds,
            draft_s=draft_s,
            offered=np.full(len(survival), stands_for),
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
