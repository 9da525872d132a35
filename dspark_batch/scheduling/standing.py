"""What a planned round leaves to the next ones: at a few rows a plan and a lesson take longer than they can gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
    price: survival from which tokens are verified. Set before the rounds that use it, so it is legal in every
    verification mode. plain_s: seconds of a plain step. num_seen: rounds without prompt tokens; saved: what they saved
    in all, in plain steps.
    """

    num_rows: int
    most: int
    most_tokens: Mapping[int, int]
    price: float
    plain_s: float
    num_left: int
    worth: Mapping[int, float] | None = None
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
        num_rounds: int,
        worth: Floats | None = None,
    ) -> StandingPlan:
        """What a round asked its rows for, of a drafter of ``most`` tokens. worth: [R], of their tokens."""
        limited = zip(load.handles, load.limits, asked, strict=True)
        less = {handle: num for handle, limit, num in limited if num < min(limit, most)}
        longest = max(asked) if len(less) == len(asked) else most
        by_handle = None if worth is None else dict(zip(load.handles, worth.tolist(), strict=True))
        return cls(len(asked), longest, less, price, plain_s, num_rounds, by_handle)

    def lengths(self, load: RoundLoad) -> list[int] | None:
        """[R] tokens to ask for in this round; None where it has to be planned."""
        if not self.num_left or not _FEWEST_ROWS * self.num_rows <= len(load.handles) <= self.num_rows:
            return None
        self.num_left -= 1
        most, by_handle = self.most, self.most_tokens
        lengths = [min(limit, by_handle.get(h, most)) for h, limit in zip(load.handles, load.limits, strict=True)]
        return lengths if any(lengths) else None

    def prices(self, handles: Sequence[int]) -> list[float]:
        """[R] survival from which a row's tokens are verified."""
        if self.worth is None:
            return [self.price] * len(handles)
        return [self.price / self.worth.get(handle, 1.0) for handle in handles]

    def note(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """One of its rounds is over. Sums are all that a round can afford; they are judged when the plan has ended."""
        if outcome.num_prefill_tokens:
            return
        took = min((outcome.draft_s + outcome.step_s) / self.plain_s, _LONGEST_ROUND)
        gained: float = sum(outcome.num_accepted)
        if self.worth is not None:
            rows = zip(load.handles, outcome.num_accepted, strict=True)
            gained = sum(num * self.worth.get(handle, 1.0) for handle, num in rows)
        self.num_seen += 1
        self.saved += gained / len(load.handles) - (took - 1.0)


def rounds_to_stand(*, saving: float, num_rounds: int) -> int:
    """How long a plan stands. saving: what drafting saves a round, in plain steps. num_rounds: that this is known from;
    the first plans stand for less."""
    return min(_ROUNDS_IF_CLEAR if saving > CLEAR_SAVING else _ROUNDS, 2 * num_rounds)


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

    def are_due(self, gain: float) -> bool:
        """gain: of the best cut of this round's drafts, as a share of the rate. Call once for every round that is
        learned from."""
        if not 0.0 < gain < _DEAREST_IN_FULL:
            return False
        self.num_cuts += 1
        return self.num_cuts % _IN_FULL_EVERY == 0


@dataclass(slots=True)
class PlainRounds:
    """Only drafted rounds would leave the cost of plain decoding to the table, so one in many is plain.

    num_drafted: in a row. seen_at: the round in which such a number of rows, by octave, was last decoded alone.
    """

    num_rounds: int = 0
    num_drafted: int = 0
    seen_at: dict[int, int] = field(default_factory=dict)

    def note_drafted(self) -> None:
        self.num_rounds += 1
        self.num_drafted += 1

    def note_plain(self, num_rows: int, *, is_alone: bool) -> None:
        """is_alone: no prompt tokens shared the step."""
        self.num_rounds += 1
        self.num_drafted = 0
        if is_alone:
            self.seen_at[num_rows.bit_length()] = self.num_rounds

    def is_due(self, gate: Gate, num_rows: int, *, is_trusted: bool) -> bool:
        """is_trusted: whether what such a round would cost is well known."""
        wait = _PLAIN_EVERY_IF_CLEAR if gate.pays and gate.saved > CLEAR_SAVING else _PLAIN_EVERY
        if not is_trusted:
            wait = _PLAIN_EVERY_IN_DOUBT
        if self.num_drafted < wait:
            return False
        self.num_drafted = 0
        seen_at = self.seen_at.get(num_rows.bit_length())
        return seen_at is None or self.num_rounds - seen_at >= wait
