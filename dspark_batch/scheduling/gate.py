"""Whether to draft at all: keeps what drafting has saved so far, and stops while it saves nothing."""

from __future__ import annotations

from dataclasses import dataclass

_SHORTEST_PAUSE = 16
_LONGEST_PAUSE = 256
_ROW_ROUNDS_TO_JUDGE = 48
_FEWEST_ROUNDS = 6
_WORTH_IT = 0.0
_MEMORY = 6


@dataclass(slots=True)
class Gate:
    """Open: drafting is tried, and judged once enough rows have been through. Closed: it pauses, longer each time.

    saved: running mean of the share of a plain step that a drafted round saved, all costs counted.
    """

    saved: float = 0.0
    num_rounds: int = 0
    was_closed: bool = False
    pause: int = _SHORTEST_PAUSE
    num_left: int = 0

    @property
    def is_first_after_pause(self) -> bool:
        return self.is_open and self.was_closed and self.num_rounds == 0

    @property
    def is_open(self) -> bool:
        return self.num_left == 0

    def skip(self) -> None:
        """A round went by without drafting."""
        assert self.num_left > 0, "only a closed gate waits"
        self.num_left -= 1

    def observe(self, saved: float, *, num_rows: int) -> None:
        """A drafted round saved this share of a plain step (negative: it cost more)."""
        self.num_rounds += 1
        enough = max(_FEWEST_ROUNDS, _ROW_ROUNDS_TO_JUDGE // num_rows)
        self.saved += (saved - self.saved) / min(self.num_rounds, _MEMORY * enough)
        if self.num_rounds < enough:
            return
        if self.saved > _WORTH_IT:
            self.pause = _SHORTEST_PAUSE
        else:
            self.close()

    def close(self) -> None:
        """Stop drafting for the length of the pause, and make the next pause longer."""
        self.was_closed = True
        self.num_left = self.pause
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)
        self.saved, self.num_rounds = 0.0, 0

    def hurry(self) -> None:
        """Something may have changed: try again soon."""
        self.pause = _SHORTEST_PAUSE
        self.num_left = min(self.num_left, 1)
