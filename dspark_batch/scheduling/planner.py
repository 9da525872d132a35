"""Which drafted tokens to verify: the likeliest ones, while emitted tokens per second rise.

All rules rank tokens by survival, so what they admit is a prefix of every row's draft. They differ in where they stop,
and with that in what the choice may have seen. Under rejection a sampled token must be kept or cut without a look at
itself or at what comes after it (arXiv 2607.05147, appendix A); its survival is a function of the tokens before it, so
ranking is legal. A stop that looks at the whole draft is not: it is for coupled verification and one-hot drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
StepSeconds = Callable[[Floats], Floats]
"""[N] rising numbers of extra tokens -> [N] seconds of the step."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """mask: [N] which tokens are worth it. num_tokens, num_accepted: their expected numbers. tokens_per_s: of the
    round, the rows' own tokens included. price: a survival that parts the tokens that are worth it from the others, for
    rounds like this one. gain: by how much the best rate exceeds that of all tokens, as a share of it."""

    mask: NDArray[np.bool_]
    num_tokens: float
    num_accepted: float
    tokens_per_s: float
    price: float
    gain: float


def admit(
    survival: Floats,
    *,
    num_rows: int,
    step_seconds: StepSeconds,
    draft_s: float,
    offered: Floats | None = None,
) -> Admitted:
    """The set of tokens with the best rate (num_rows + their survivals) / (draft_s + step_seconds(number of them)).

    survival: [N], or its product with what a row's tokens are worth; within a row nonincreasing and in draft order. Of
    equal ones the earlier is taken first, so that the set is a prefix of every row's draft. offered: [N] how much each
    token counts: the chance that it will exist at all, where the draft is yet to be made, or how many rows it stands
    for. Every subset size is tried (the cost may have steps), so the choice depends on all tokens: not for sampled
    drafts under rejection.
    """
    ranked = _rank(survival, offered, num_rows=num_rows)
    rates = ranked.rates(step_seconds=step_seconds, draft_s=draft_s)
    return ranked.take(int(rates.argmax()), rates)


def admit_early_stop(survival: Floats, *, num_rows: int, step_seconds: StepSeconds, draft_s: float) -> Admitted:
    """Algorithm 1 of arXiv 2607.05147: tokens enter by falling survival until one would lower the rate.

    Arguments as for :func:`admit`. Whether a token enters depends on those that rank before it, and those after it in
    its own row never do: legal in every mode. On a cost with stairs it may stop in front of a step that would pay.
    """
    ranked = _rank(survival, None, num_rows=num_rows)
    rates = ranked.rates(step_seconds=step_seconds, draft_s=draft_s)
    falls = np.flatnonzero(rates[1:] < rates[:-1])
    return ranked.take(int(falls[0]) if len(falls) else len(survival), rates)


def admit_budget(
    survival: Floats, *, budget: int, num_rows: int, step_seconds: StepSeconds, draft_s: float
) -> Admitted:
    """The lagged variant: the ``budget`` likeliest tokens. Legal in every mode if the budget was set before the round.

    Arguments as for :func:`admit`. Ties go to the earlier place in the batch, never by a token's value.
    """
    ranked = _rank(survival, None, num_rows=num_rows)
    rates = ranked.rates(step_seconds=step_seconds, draft_s=draft_s)
    return ranked.take(min(budget, len(survival)), rates)


class LaggedBudgets:
    """:func:`admit_budget` with the number of tokens that would have been best in the round before, by octaves of rows;
    a first round keeps to :func:`admit_early_stop`."""

    def __init__(self) -> None:
        self._by_octave: dict[int, int] = {}

    def admit(self, survival: Floats, *, num_rows: int, step_seconds: StepSeconds, draft_s: float) -> Admitted:
        """Arguments as for :func:`admit`."""
        octave = num_rows.bit_length()
        budget = self._by_octave.get(octave)
        best = admit(survival, num_rows=num_rows, step_seconds=step_seconds, draft_s=draft_s)
        self._by_octave[octave] = round(best.num_tokens)
        if budget is None:
            return admit_early_stop(survival, num_rows=num_rows, step_seconds=step_seconds, draft_s=draft_s)
        return admit_budget(survival, budget=budget, num_rows=num_rows, step_seconds=step_seconds, draft_s=draft_s)


@dataclass(frozen=True, slots=True)
class _Ranked:
    best_first: Ints
    survival: Floats
    num_tokens: Floats
    num_accepted: Floats
    num_rows: int

    def rates(self, *, step_seconds: StepSeconds, draft_s: float) -> Floats:
        return (self.num_rows + self.num_accepted) / (draft_s + step_seconds(self.num_tokens))

    def take(self, count: int, rates: Floats) -> Admitted:
        mask = np.zeros(len(self.best_first), bool)
        mask[self.best_first[:count]] = True
        num_tokens, num_accepted, rate = (float(x[count]) for x in (self.num_tokens, self.num_accepted, rates))
        gain = float(rates.max() / rates[-1]) - 1.0
        return Admitted(mask, num_tokens, num_accepted, rate, self._price(count, rates), gain)

    def _price(self, count: int, rates: Floats) -> float:
        """What a token costs on average at the best rate, if that is between the last token admitted and the first one
        left out; else their middle."""
        if not len(self.survival):
            return 0.0
        least = float(self.survival[count]) if count < len(self.survival) else 0.0
        most = float(self.survival[count - 1]) if count else max(1.0, 2.0 * least)
        first_s, last_s = ((self.num_rows + self.num_accepted[[0, -1]]) / rates[[0, -1]]).tolist()
        price = float(rates[count] * (last_s - first_s) / self.num_tokens[-1])
        return price if least < price < most else (least + most) / 2


def _rank(survival: Floats, offered: Floats | None, *, num_rows: int) -> _Ranked:
    best_first = np.argsort(-survival, kind="stable")
    counted = ranked = survival[best_first]
    num_tokens: Floats = np.arange(len(survival) + 1, dtype=np.float64)
    if offered is not None:
        weights = offered[best_first]
        counted = weights * ranked
        num_tokens[1:] = np.cumsum(weights)
    num_accepted = np.concatenate([[0.0], np.cumsum(counted)])
    return _Ranked(best_first, ranked, num_tokens, num_accepted, num_rows)
