"""A little exploration: now and then one row's draft is verified in full, so that cut slots keep getting labels."""

from __future__ import annotations

from dataclasses import dataclass

EVERY_ROUNDS = 16


@dataclass(slots=True)
class Exploration:
    """Picks one row every ``every`` drafted rounds, going round.

    The choice depends on the number of rounds alone, never on tokens, so it is legal in all verification modes. With
    one row, every ``every``-th of its rounds is verified in full; with 64, one row in 64 of them.
    """

    every: int = EVERY_ROUNDS
    num_rounds: int = 0

    def next_row(self, num_rows: int) -> int | None:
        """Call once per drafted round; the row to verify in full, or None."""
        self.num_rounds += 1
        turn, rest = divmod(self.num_rounds, self.every)
        return turn % num_rows if num_rows and not rest else None
