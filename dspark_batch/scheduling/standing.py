"""What a planned round leaves to the next ones: at a few rows a plan and a lesson take longer than they can gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

_ROUNDS = 7
_ROUNDS_IF_CLEAR = 31

CLEAR_SAVING = 0.2
"""Plain steps that a round saves, from which on plans stand longer and plain steps are rarer."""

_LONGEST_ROUND = 4.0
"""Plain steps; a round that took longer is a hiccup of the machine and counts as this."""

_ROUNDS_PER_LESSON = 4
_CUT_GAIN_RATE = 0.05
_IN_FULL_EVERY = 4
_DEAREST_IN_FULL = 0.25

LEAST_GAIN_OF_A_CUT = 0.05
"""Share of the rate. What is foretold of a cut is about twice what it brings: the best of many sizes is partly the
luckiest."""


@dataclass(slots=True)
class StandingPlan:
    """A plan that stands for a few rounds of as many rows.

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
    num_left: int = _ROUNDS
    num_seen: int = 0
    saved: float = 0.0

    @classmethod
    def of_round(
        cls, load: RoundLoad, asked: Sequence[int], *, most: int, price: float, plain_s: float, saving: float
    ) -> StandingPlan:
        """What a round asked its rows for, of a drafter of ``most`` tokens.

        saving: what drafting saves a round, in plain steps; the more, the longer the plan stands.
        """
        limited = zip(load.handles, load.limits, asked, strict=True)
        less = {handle: num for handle, limit, num in limited if num < min(limit, most)}
        longest = max(asked) if len(less) == len(asked) else most
        num_rounds = _ROUNDS_IF_CLEAR if saving > CLEAR_SAVING else _ROUNDS
        return cls(len(asked), longest, less, price, plain_s, num_rounds)

    def lengths(self, handles: Sequence[int], limits: Sequence[int]) -> list[int] | None:
        """[R] tokens to ask for in this round; None where it has to be planned."""
        if not self.num_left or len(handles) != self.num_rows:
            return None
        self.num_left -= 1
        most, by_handle = self.most, self.most_tokens
        lengths = [min(limit, by_handle.get(h, most)) for h, limit in zip(handles, limits, strict=True)]
        return lengths if any(lengths) else None

    def note(self, outcome: RoundOutcome) -> None:
        """One of its rounds is over. Sums are all that a round can afford; they are judged when the plan has ended."""
        if outcome.num_prefill_tokens:
            return
        took = min((outcome.draft_s + outcome.step_s) / self.plain_s, _LONGEST_ROUND)
        self.num_seen += 1
        self.saved += sum(outcome.num_accepted) / self.num_rows - (took - 1.0)


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
class Cuts:
    """Whether cutting drafts pays over the rounds, by octaves of rows: a single round says little. gains: means."""

    gains: dict[int, float] = field(default_factory=dict)
    num_cuts: int = 0

    def pay(self, num_rows: int, gain: float) -> bool:
        """gain: of the best cut of this round's drafts, as a share of the rate."""
        octave = num_rows.bit_length()
        before = self.gains.get(octave, gain)
        self.gains[octave] = before + _CUT_GAIN_RATE * (gain - before)
        return self.gains[octave] > LEAST_GAIN_OF_A_CUT

    def is_due_in_full(self, gain: float) -> bool:
        """Now and then drafts that would be cut are verified in full, so that a size that only looks dear is found
        out. Call once for every round that is learned from."""
        if not 0.0 < gain < _DEAREST_IN_FULL:
            return False
        self.num_cuts += 1
        return self.num_cuts % _IN_FULL_EVERY == 0
