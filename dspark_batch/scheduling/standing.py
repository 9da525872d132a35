"""What a planned round leaves to the next ones: at a few rows a plan and a lesson take longer than they can gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_ROUNDS = 7
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
    verification mode.
    """

    num_rows: int
    most: int
    most_tokens: Mapping[int, int]
    price: float
    num_left: int = _ROUNDS

    @classmethod
    def of_round(
        cls, handles: Sequence[int], limits: Sequence[int], asked: Sequence[int], *, most: int, price: float
    ) -> StandingPlan:
        """What a round asked its rows for, which could use ``limits`` and the drafter ``most`` tokens."""
        less = {h: a for h, limit, a in zip(handles, limits, asked, strict=True) if a < min(limit, most)}
        return cls(len(handles), max(asked) if len(less) == len(handles) else most, less, price)

    def lengths(self, handles: Sequence[int], limits: Sequence[int]) -> list[int] | None:
        """[R] tokens to ask for in this round; None where it has to be planned."""
        if not self.num_left or len(handles) != self.num_rows:
            return None
        self.num_left -= 1
        most, by_handle = self.most, self.most_tokens
        lengths = [min(limit, by_handle.get(h, most)) for h, limit in zip(handles, limits, strict=True)]
        return lengths if any(lengths) else None


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
