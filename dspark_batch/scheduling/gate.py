"""Whether to draft at all: closed, it looks now and then at what drafting would save; open, at what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

_SHORTEST_PAUSE = 2
_LONGEST_PAUSE = 64
_EXPLORATION_SHARE = 0.005
"""Of the time of plain decoding, spent on drafts of a closed gate, once the first credit is spent."""

_FIRST_CREDIT = 0.5
"""Plain steps that the first probes may take before they have to keep to their share."""

_FEWEST_PROBES = 2
_MOST_PROBES = 16
_PROBED_ROWS_TO_JUDGE = 16
_PROBE_MEMORY = 4
_PROMISING = 0.02
_MUCH = 0.2
_ROW_ROUNDS_TO_JUDGE = 16
_FEWEST_ROUNDS = 6
_ROUNDS_TO_RELY_ON = 2
_ROW_ROUNDS_REMEMBERED = 288
_MOST_LOST = 4.0
_MOST_SAVED = 16.0
"""Plain steps: drafting may lose so many before it ends, and savings beyond so many do not allow for more."""

_SURE = 2.0
"""Standard errors below zero at which a mean is taken for a loss."""


@dataclass(slots=True)
class Gate:
    """One for each kind of rounds. Savings are shares of a plain step, all costs counted.

    Closed, every pause ends with a probe: a draft of which only what surely pays is verified. Pauses double while
    probes of enough rows promise nothing, and are never so short that probes take more than a small share of the time,
    but for a credit at first, while little is known, and while much is promised by what was not wrong before.
    Promising probes open the gate; each time that it had to be closed again more of them are asked for.

    saved, variance: running, over the drafted rounds since it was opened. balance: their sum, within bounds. promise:
    over the latest probes.
    """

    is_open: bool = False
    saved: float = 0.0
    variance: float = 0.0
    balance: float = 0.0
    num_rounds: int = 0
    promise: float = 0.0
    num_probes: int = 0
    num_probed_rows: int = 0
    probes_needed: int = _FEWEST_PROBES
    pause: int = _SHORTEST_PAUSE
    num_left: int = 0
    credit: float = _FIRST_CREDIT

    @property
    def is_stale(self) -> bool:
        """Whether pauses are so long that what earlier probes found may be out of date."""
        return self.pause >= _LONGEST_PAUSE

    @property
    def pays(self) -> bool:
        """Whether drafting was seen to save time, so that not every round has to be planned and judged by itself."""
        return self.is_open and self.saved > 0.0 and self.num_rounds >= _ROUNDS_TO_RELY_ON

    def rests(self) -> bool:
        """Whether the gate is closed and its pause takes this round; call at most once for a round."""
        if self.is_open or self.num_left <= 0:
            return False
        self.num_left -= 1
        return True

    def is_probe_due(self) -> bool:
        """Call once for every round of a closed gate."""
        assert not self.is_open, "an open gate needs no probes"
        return not self.rests()

    def observe_probe(self, promise: float | None, *, num_rows: int, cost_share: float) -> None:
        """promise: what drafting would save a round, None where too little is known yet. num_rows: that were
        probed. cost_share: what the probe took, in plain steps."""
        is_urgent = promise is None
        if promise is not None:
            self.num_probes += 1
            self.num_probed_rows += num_rows
            memory = max(_PROBE_MEMORY, _PROBED_ROWS_TO_JUDGE // num_rows)
            self.promise += (promise - self.promise) / min(self.num_probes, memory)
            is_promising = self.promise > _PROMISING
            is_urgent = self.promise > _MUCH and self.probes_needed == _FEWEST_PROBES
            if is_promising and self.num_probes >= self.probes_needed:
                self.is_open = True
                self.saved = self.variance = self.balance = 0.0
                self.num_rounds = 0
                return
            if is_promising:
                self.pause = _SHORTEST_PAUSE
            elif self.num_probed_rows >= _PROBED_ROWS_TO_JUDGE:
                self.pause = min(2 * self.pause, _LONGEST_PAUSE)
        self.credit -= cost_share
        # The first labels come soon, and after a few promising probes the gate opens, or they promise nothing any more.
        affordable = 0 if self.credit > 0 or is_urgent else int(cost_share / _EXPLORATION_SHARE)
        wait = 1 if promise is None else self.pause
        self.num_left = min(max(wait, affordable), 4 * _LONGEST_PAUSE)

    def observe(self, saved: float, *, num_rows: int, num_rounds: int = 1) -> None:
        """A drafted round of an open gate, or ``num_rounds`` of them on average, saved this share of a plain step
        (negative: it cost more).

        The gate closes where drafting surely loses, or has lost some plain steps in all. One round says little: at a
        few rows, a handful of bad ones would close it on a drafter that pays.
        """
        self.num_rounds += 1
        self.balance = min(self.balance + saved * num_rounds, _MOST_SAVED)
        memory = max(6 * _FEWEST_ROUNDS, _ROW_ROUNDS_REMEMBERED // num_rows)
        num_remembered = min(self.num_rounds, memory)
        off = saved - self.saved
        self.saved += off / num_remembered
        self.variance += (off * (saved - self.saved) - self.variance) / num_remembered
        if self.num_rounds < max(_FEWEST_ROUNDS, _ROW_ROUNDS_TO_JUDGE // num_rows):
            return
        if self.balance < -_MOST_LOST or self.saved < -_SURE * sqrt(self.variance / num_remembered):
            self.close()
        elif self.saved > _PROMISING and self.num_rounds >= memory:
            self.probes_needed = _FEWEST_PROBES

    def close(self) -> None:
        """Stop drafting; it takes more promising probes than before to begin again."""
        self.is_open = False
        self.promise, self.num_probes, self.num_probed_rows = 0.0, 0, 0
        self.probes_needed = min(2 * self.probes_needed, _MOST_PROBES)
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)
        self.num_left = self.pause

    def hurry(self) -> None:
        """Something may have changed: probe soon."""
        self.pause = _SHORTEST_PAUSE
        self.num_probed_rows = 0
        self.num_left = min(self.num_left, 1)
