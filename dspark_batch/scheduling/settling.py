"""Rounds that need no plan of their own: where drafting saves much and plans cut nothing."""

from __future__ import annotations

from dataclasses import dataclass

_SETTLED_AFTER = 8
_SETTLED_ROUNDS = 3
_SETTLED_SAVING = 0.3


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
