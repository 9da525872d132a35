"""A time limit that stages look at between pieces of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


class TimeUpError(Exception):
    """The time limit was reached; what was done is saved, and the same command goes on from there."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """end_s: reading of ``clock`` at which work should stop; None for no limit."""

    end_s: float | None = None
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def in_minutes(cls, minutes: float | None, *, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """``minutes`` from now; None for never."""
        return cls(None if minutes is None else clock() + 60.0 * minutes, clock)

    @property
    def has_passed(self) -> bool:
        return self.end_s is not None and self.clock() >= self.end_s

    def check(self) -> None:
        """Raise TimeUpError once the time is up."""
        if self.has_passed:
            raise TimeUpError
