"""From engines that broke to the rows that break them, and to the point where a run gives up. Outlives the engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

WITHOUT_A_WORD = "the process ended without a word (killed, out of memory, or crashed)"
MAX_FRUITLESS_STARTS = 4
"""Starts of an engine in a row, per engine of the run, between which no shard was committed."""
FAULTS_BEFORE_ISOLATION = 2
"""A shard that was in flight when so many engines broke is tried by itself."""
STEP_ROWS = 32
"""Rows of such a shard that are in the engine together, until an engine breaks over them: then one at a time."""
MAX_BAD_ROWS_IN_A_ROW = 3
"""So many rows that break an engine, each by itself, with no good one between, are not taken for the rows' fault."""
MAX_BAD_ROWS = 32
"""Nor are more than so many of one shard: an engine that breaks from time to time would go through all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How a shard is tried: among others or, after engines broke over it, by itself in ``steps``.

    ``suspects`` were together in an engine that broke, ``faults`` are the rows known to break it, with what was said.
    """

    is_isolated: bool = False
    suspects: range = range(0)
    faults: Mapping[int, str] = field(default_factory=dict)

    def steps(self, num_rows: int) -> Iterator[range]:
        """Rows that go into the engine together, up to ``STEP_ROWS``: the suspects first, and one at a time."""
        for row in self.suspects:
            yield range(row, row + 1)
        start = 0
        while start < num_rows:
            if start in self.suspects:
                start = self.suspects.stop
                continue
            end = self.suspects.start if start < self.suspects.start else num_rows
            stop = min(start + STEP_ROWS, end)
            yield range(start, stop)
            start = stop


UNSUSPECTED = Trial()


@dataclass(slots=True)
class _InFlight:
    """What is known of a shard that is not committed. ``step``: its rows that are in an engine by themselves."""

    num_begun: int = 0
    step: range = range(0)
    fault: str = WITHOUT_A_WORD
    suspects: range = range(0)
    faults: dict[int, str] = field(default_factory=dict)


class FaultLog:
    """Notes what engines begin and finish, so that an engine which broke, even without a word, shows at the next start.

    ``end_reason`` says why the run must end, once engines break without any row being to blame. ``warnings`` are for
    the driver to show, each text once. Not thread-safe.
    """

    def __init__(self, *, num_engines: int) -> None:
        self.end_reason: str | None = None
        self.warnings: list[str] = []
        self._max_starts = MAX_FRUITLESS_STARTS * num_engines
        self._num_starts = 0
        self._num_bad_rows = 0
        self._last_fault: str | None = None
        self._is_loading = False
        self._in_flight: dict[str, _InFlight] = {}

    def begin_engine(self) -> None:
        """An engine starts, unless ``end_reason`` is set then: the starts before it came to nothing."""
        self._num_starts += 1
        if self._num_starts > self._max_starts:
            fault = self._last_fault or WITHOUT_A_WORD
            if self._last_fault is None and self._is_loading:
                fault = f"while it loaded the model, {WITHOUT_A_WORD}"
            self._end(f"the engine broke {self._num_starts - 1} times without finishing a shard; last: {fault}")
        self._is_loading = True

    def note_loaded(self, warnings: Iterable[str] = ()) -> None:
        """The engine that started last has its model and takes shards; what was warned of meanwhile."""
        self._is_loading = False
        self._warn(*warnings)

    def begin(self, shard: str) -> Trial:
        """A shard is begun. One that was begun before and not committed was in flight when an engine broke."""
        known = self._in_flight.setdefault(shard, _InFlight())
        if known.step:
            self._blame(known, known.step)
        trial = Trial(
            is_isolated=known.num_begun >= FAULTS_BEFORE_ISOLATION, suspects=known.suspects, faults=dict(known.faults)
        )
        known.num_begun += 1
        return trial

    def note_step(self, shard: str, rows: range, *, works: bool) -> None:
        """These rows of a shard go into an engine by themselves; those before them are through. ``works``: that engine
        has generated some of them."""
        known = self._in_flight[shard]
        known.step, known.fault = rows, WITHOUT_A_WORD
        if works:
            self._num_bad_rows = 0
        # Comes to something either way: the rows get done, or are fewer than the ones suspected so far.
        self._num_starts = 0

    def note_fault(self, message: str, *, shard: str) -> None:
        """An engine broke that had the shard; it is replaced."""
        self._last_fault = message
        self._warn(f"the engine broke and is loaded again: {message}")
        if shard in self._in_flight:
            self._in_flight[shard].fault = message

    def note_commit(self, shard: str) -> None:
        self._num_starts = self._num_bad_rows = 0
        self._in_flight.pop(shard, None)

    def _blame(self, known: _InFlight, rows: range) -> None:
        known.step = range(0)
        if len(rows) > 1:
            before = known.suspects or rows
            known.suspects = range(min(before.start, rows.start), max(before.stop, rows.stop))
            return
        known.faults[rows.start] = known.fault
        self._num_bad_rows += 1
        if self._num_bad_rows >= MAX_BAD_ROWS_IN_A_ROW or len(known.faults) > MAX_BAD_ROWS:
            num_rows = max(self._num_bad_rows, len(known.faults))
            self._end(f"the engine broke over {num_rows} rows, each by itself; last: {known.fault}")

    def _warn(self, *texts: str) -> None:
        self.warnings += [text for text in texts if text not in self.warnings]

    def _end(self, reason: str) -> None:
        if self.end_reason is None:
            self.end_reason = reason
