"""What a planned round leaves to the next ones, as a plan and a lesson may take longer than they can gain; and which
rounds are lessons, or plain, for what they teach."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import Seen
from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

Floats = NDArray[np.float64]

_ROUNDS = 7
_ROUNDS_IF_CLEAR = 31

CLEAR_SAVING = 0.2
"""Plain steps that a round saves, from which on plans stand longer and plain steps are rarer."""

_LONGEST_ROUND = 4.0
"""Plain steps; a round that took longer is a hiccup of the machine and counts as this."""

_FEWEST_ROWS = 0.75
"""Of those that were planned for; with fewer a token costs less."""

_ROUNDS_PER_LESSON = 4
_IN_FULL_EVERY = 16
_DEAREST_IN_FULL = 0.25

_PLAIN_EVERY_IN_DOUBT = 8
_PLAIN_EVERY = 64
_PLAIN_EVERY_IF_CLEAR = 512
"""Rounds after which one plain round is run if none was."""


@dataclass(slots=True)
class StandingPlan:
    """A plan that stands for a few rounds of about as many rows.

    most_tokens: to ask for, by handle of those that are asked for less than the others, who are asked for ``most``.
    price: survival, times the worth of the row's tokens, from which tokens are verified. Set before the rounds that use
    it, so it is legal in every verification mode. plain_s: seconds of a plain step. worth: by handle; None where all
    rows are alike. asked: [R] of the latest round that kept to it. num_left: rounds for which it stands. num_seen:
    rounds that were judged; saved: what they saved in all, in plain steps.
    """

    num_rows: int
    most: int
    most_tokens: Mapping[int, int]
    price: float
    plain_s: float
    worth: Mapping[int, float] | None = None
    asked: list[int] = field(default_factory=list)
    num_left: int = _ROUNDS
    num_seen: int = 0
    saved: float = 0.0

    @classmethod
    def of_round(
        cls,
        load: RoundLoad,
        asked: Sequence[int],
        *,
        most: int,
        price: float,
        plain_s: float,
        worth: Floats | None = None,
    ) -> StandingPlan:
        """What a round asked its rows for, of a drafter of ``most`` tokens. worth: [R], of their tokens."""
        limited = zip(load.handles, load.limits, asked, strict=True)
        less = {handle: num for handle, limit, num in limited if num < min(limit, most)}
        longest = max((num for limit, num in zip(load.limits, asked, strict=True) if limit >= most), default=most)
        by_handle = None if worth is None else dict(zip(load.handles, worth.tolist(), strict=True))
        return cls(len(asked), longest, less, price, plain_s, by_handle)

    def keeps(self, load: RoundLoad) -> bool:
        """Whether this round may keep to the plan, and then what it ``asked`` for; else it has to be planned."""
        if not self.num_left or not _FEWEST_ROWS * self.num_rows <= len(load.handles) <= self.num_rows:
            return False
        self.num_left -= 1
        most, by_handle = self.most, self.most_tokens
        self.asked = [min(limit, by_handle.get(h, most)) for h, limit in zip(load.handles, load.limits, strict=True)]
        return any(self.asked)

    def prices(self, handles: Sequence[int]) -> list[float]:
        """[R] survival from which a row's tokens are verified."""
        if self.worth is None:
            return [self.price] * len(handles)
        return [self.price / self.worth.get(handle, 1.0) for handle in handles]

    def note(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """One of its rounds is over. Sums are all that a round can afford; they are judged when the plan has ended.

        Only rounds without prompts and of as many rows can be compared with the planned one's plain step.
        """
        if outcome.num_prefill_tokens or len(load.handles) < self.num_rows:
            return
        took = min((outcome.draft_s + outcome.step_s) / self.plain_s, _LONGEST_ROUND)
        gained: float = sum(outcome.num_accepted)
        if self.worth is not None:
            rows = zip(load.handles, outcome.num_accepted, strict=True)
            gained = sum(num * self.worth.get(handle, 1.0) for handle, num in rows)
        self.num_seen += 1
        self.saved += gained / len(load.handles) - (took - 1.0)


class StandingPlans:
    """One for each kind of rounds, with and without prompt tokens, so that rounds of several kinds which take turns do
    not end each other's."""

    def __init__(self) -> None:
        self._by_kind: dict[Hashable, dict[bool, StandingPlan]] = {}

    def find(self, kind: Hashable, gate: Gate, load: RoundLoad) -> StandingPlan | None:
        """The plan that this round keeps to, with the tokens it asks for; None where the round has to be planned.

        When a plan has come to its end, its rounds count for the gate like one round that saved their mean. With a
        closed gate none stands.
        """
        plans = self._by_kind.get(kind)
        if not plans:
            return None
        if not gate.is_open:
            plans.clear()
            return None
        has_prompts = load.num_prefill_tokens > 0
        plan = plans.get(has_prompts)
        if plan is None or plan.keeps(load):
            return plan
        del plans[has_prompts]
        if plan.num_seen:
            gate.observe(plan.saved / plan.num_seen, num_rows=plan.num_rows, num_rounds=plan.num_seen)
        return None

    def put(self, kind: Hashable, gate: Gate, load: RoundLoad, plan: StandingPlan) -> None:
        """Let a plan stand: the longer, the more drafting is seen to save, and as far as that is known. What prompts
        share a step with, and what a row is worth in a draining batch, is soon different."""
        has_prompts = load.num_prefill_tokens > 0
        is_passing = has_prompts or plan.worth is not None
        most = _ROUNDS_IF_CLEAR if gate.saved > CLEAR_SAVING and not is_passing else _ROUNDS
        plan.num_left = min(most, 2 * gate.num_rounds)
        self._by_kind.setdefault(kind, {})[has_prompts] = plan


@dataclass(slots=True)
class Pace:
    """Once much is known, one round in a few is learned from.

    The choice depends on the number of rounds and on which of them were planned, never on their drafts, so what is
    learned is not biased by it.
    """

    num_since: int = 0

    def is_lesson(self, *, is_young: bool) -> bool:
        """Call once for every round that could be one. is_young: little is known yet."""
        self.num_since += 1
        if not is_young and self.num_since < _ROUNDS_PER_LESSON:
            return False
        self.num_since = 0
        return True

    def skip(self) -> None:
        """A round that is none."""
        self.num_since += 1


@dataclass(slots=True)
class FullDrafts:
    """Now and then drafts that would be cut are verified in full, so that a size that only looks dear is found out."""

    num_cuts: int = 0

    def are_due(self, gain: float, *, seen: Seen) -> bool:
        """Call once for every round that is learned from. gain: of the best cut of its drafts, as a share of the rate.
        seen: a step with all of them."""
        if gain <= 0.0 or (gain >= _DEAREST_IN_FULL and seen is Seen.AS_EXPECTED):
            return False
        self.num_cuts += 1
        return seen is Seen.DIFFERENT or self.num_cuts % _IN_FULL_EVERY == 0


@dataclass(slots=True)
class PlainRounds:
    """Only drafted rounds would leave the cost of plain decoding to the table, so one in many is plain.

    num_drafted: in a row. seen_at: the round in which so many rows, by octave, were last decoded with nothing else in
    the step.
    """

    num_rounds: int = 0
    num_drafted: int = 0
    seen_at: dict[int, int] = field(default_factory=dict)

    def count(self, num_rows: int, *, num_step_tokens: int, is_drafted: bool) -> None:
        """Call once for every round."""
        self.num_rounds += 1
        self.num_drafted = self.num_drafted + 1 if is_drafted else 0
        if num_step_tokens == num_rows:
            self.seen_at[num_rows.bit_length()] = self.num_rounds

    def is_due(self, gate: Gate, num_rows: int, *, seen: Seen) -> bool:
        """seen: such a round."""
        wait = _PLAIN_EVERY_IF_CLEAR if gate.pays and gate.saved > CLEAR_SAVING else _PLAIN_EVERY
        if seen is not Seen.AS_EXPECTED:
            wait = _PLAIN_EVERY_IN_DOUBT
        if self.num_drafted < wait:
            return False
        self.num_drafted = 0
        seen_at = self.seen_at.get(num_rows.bit_length())
        return seen_at is None or self.num_rounds - seen_at >= wait
