"""Rounds that need no thought of their own: no plan where plans cut nothing, no lesson where much is known."""

from __future__ import annotations

from dataclasses import dataclass

_SETTLED_AFTER = 8
_SETTLED_ROUNDS = 3
_SETTLED_SAVING = 0.3
_ROUNDS_PER_LESSON = 4


@dataclass(slots=True)
class Settling:
    """After some plans in a row that asked for everything and cut nothing, a few rounds do the same unplanned.

    num_whole: such plans so far. num_left: rounds that need no plan.
    """

    num_whole: int = 0
    num_left: int = 0

    def takes_round(self, *, is_same_batch: bool) -> bool:
        """Whether the next round needs no plan. A change of rows ends it."""
        if not is_same_batch:
            self.num_left = 0
        if not self.num_left:
            return False
        self.num_left -= 1
        return True

    def observe(self, *, is_whole: bool, saved: float) -> None:
        """A planned round verified all that could be drafted, or not. saved: by drafting lately, in plain steps."""
        self.num_whole = self.num_whole + 1 if is_whole and saved > _SETTLED_SAVING else 0
        if self.num_whole >= _SETTLED_AFTER:
            self.num_left = _SETTLED_ROUNDS


@dataclass(slots=True)
class Pace:
    """Once much is known, one round in a few is learned from: at a few rows lessons take as long as plans do.

    The choice depends on the number of rounds alone, so what is learned is not biased by it.
    """

    num_rounds: int = 0

    def is_lesson(self, *, is_young: bool) -> bool:
        """Call once for every round. is_young: little is known yet."""
        self.num_rounds += 1
        return is_young or self.num_rounds % _ROUNDS_PER_LESSON == 0
