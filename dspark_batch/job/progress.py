"""The progress of a run: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from dspark_batch.job.outcome import Totals

if TYPE_CHECKING:
    from dspark_batch.batch.live import LiveCounts

LINE_INTERVAL_S = 5.0
LONGEST_LINE_INTERVAL_S = 60.0
_INTERVAL_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do: rows and shards that were not committed when it started."""

    num_rows: int
    num_shards: int
    num_samples_per_row: int = 1
    max_tokens_per_row: int | None
    """None where no tokens are generated; the speed is in rows then."""


class ProgressReport(Protocol):
    """Shows totals while the run goes on; a context manager, so that the terminal is always left in order."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, totals: Totals, live: LiveCounts) -> None: ...
    def say(self, message: str) -> None: ...


def progress_report(work: Work, *, stream: TextIO) -> ProgressReport:
    """A bar where ``stream`` is a terminal, else plain lines."""
    if stream.isatty():
        return BarReport(work, console=Console(file=stream))
    return LineReport(work, stream=stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a progress line shows: rows and tokens that are generated, shards and failures that are committed.

    num_work_rows: of the whole run; while a filter is at work an upper bound, known when all shards are committed.
    """

    num_rows: int
    num_work_rows: int
    num_shards: int
    num_failed_rows: int
    num_generated_tokens: int
    num_rounds: int

    @classmethod
    def of(cls, work: Work, totals: Totals, live: LiveCounts) -> Progress:
        """Whichever is further, the committed totals or the live counts (which lack rows that took a copied result)."""
        live_rows = live.num_samples // work.num_samples_per_row
        is_done = totals.num_shards >= work.num_shards
        num_rows = totals.num_rows if is_done else min(work.num_rows, max(totals.num_rows, live_rows))
        return cls(
            num_rows=num_rows,
            num_work_rows=num_rows if is_done else work.num_rows,
            num_shards=totals.num_shards,
            num_failed_rows=totals.num_failed_rows,
            num_generated_tokens=max(totals.num_generated_tokens, live.num_generated_tokens),
            num_rounds=max(totals.num_rounds, live.num_rounds),
        )


class Rate:
    """How fast a count grows since it was first noted."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def note(self, count: int, *, now_s: float) -> None:
        """What the count is at ``now_s``."""
        self._last = (count, now_s)
        if self._first is None:
            self._first = self._last

    @property
    def per_s(self) -> float | None:
        """None until it was seen twice."""
        if self._first is None:
            return None
        (first, first_s), (last, last_s) = self._first, self._last
        return (last - first) / (last_s - first_s) if last_s > first_s else None


class Pace:
    """The speed of a run since it was first noted, and the time that it will still take.

    Rows are counted from the first that came out, as those beside it in the batch are then half done, like later on;
    and no row is taken to be longer than it may be.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tokens = Rate()
        self._rows = Rate()

    def note(self, progress: Progress, *, now_s: float) -> None:
        """How far the run is at ``now_s``."""
        self._tokens.note(progress.num_generated_tokens, now_s=now_s)
        if progress.num_rows:
            self._rows.note(progress.num_rows, now_s=now_s)

    @property
    def speed(self) -> str | None:
        """In tokens, or in rows where no tokens are generated."""
        unit, rate = ("rows", self._rows) if self._work.max_tokens_per_row is None else ("tokens", self._tokens)
        return None if rate.per_s is None else format_speed(rate.per_s, unit)

    def left_s(self, progress: Progress) -> float | None:
        """Time that the rows which are left will take; None where nothing tells yet."""
        num_left = progress.num_work_rows - progress.num_rows
        if not num_left and progress.num_rows:
            return 0.0
        guesses = [(num_left, self._rows.per_s)]
        if self._work.max_tokens_per_row is not None:
            most = progress.num_work_rows * self._work.max_tokens_per_row - progress.num_generated_tokens
            guesses.append((most, self._tokens.per_s))
        return min((count / per_s for count, per_s in guesses if count >= 0 and per_s), default=None)


def format_progress(work: Work, progress: Progress, pace: Pace) -> str:
    """Shards, tokens/s, accepted length, failures and time left, in one line."""
    parts = [f"shards {progress.num_shards}/{work.num_shards}"]
    if pace.speed is not None:
        parts.append(pace.speed)
    if progress.num_rounds:
        parts.append(f"accepted length {progress.num_generated_tokens / progress.num_rounds:.2f}")
    parts.append(f"failed {progress.num_failed_rows}")
    left_s = pace.left_s(progress)
    if left_s is not None:
        parts.append(f"left {format_duration(left_s)}")
    return " · ".join(parts)


def format_speed(per_s: float, unit: str) -> str:
    return f"{per_s:,.1f} {unit}/s" if 0 < per_s < 10 else f"{per_s:,.0f} {unit}/s"


def counted(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def rows_in_shards(num_rows: int, num_shards: int) -> str:
    return f"{counted(num_rows, 'row')} in {counted(num_shards, 'shard')}"


def format_duration(seconds: float) -> str:
    """``42s``, ``3m 05s``, ``2h 07m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class LineReport:
    """Writes a line at most every ``interval_s``, less often in long runs or where nothing moves; one at the end."""

    def __init__(
        self,
        work: Work,
        *,
        stream: TextIO,
        interval_s: float = LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._start_s = self._written_s = clock()
        self._pace = Pace(work)
        self._unwritten: Progress | None = None
        self._written: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unwritten is not None:
            self._write(self._unwritten)

    def update(self, totals: Totals, live: LiveCounts) -> None:
        self._unwritten = Progress.of(self._work, totals, live)
        now_s = self._clock()
        self._pace.note(self._unwritten, now_s=now_s)
        wait_s = max(self._interval_s, min(LONGEST_LINE_INTERVAL_S, _INTERVAL_SHARE * (now_s - self._start_s)))
        if self._unwritten == self._written:
            wait_s = LONGEST_LINE_INTERVAL_S
        if now_s - self._written_s >= wait_s:
            self._write(self._unwritten)

    def say(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()

    def _write(self, progress: Progress) -> None:
        self._written_s = self._clock()
        self._unwritten, self._written = None, progress
        percent = 100 * progress.num_rows // progress.num_work_rows if progress.num_work_rows else 100
        line = format_progress(self._work, progress, self._pace)
        self.say(f"rows {progress.num_rows}/{progress.num_work_rows} ({percent} %) · {line}")


class BarReport:
    """A bar over rows with the same figures beside it."""

    def __init__(self, work: Work, *, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._work = work
        self._clock = clock
        self._pace = Pace(work)
        self._bar = Bar(
            TextColumn("rows {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=work.num_rows)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, totals: Totals, live: LiveCounts) -> None:
        progress = Progress.of(self._work, totals, live)
        self._pace.note(progress, now_s=self._clock())
        line = format_progress(self._work, progress, self._pace)
        self._bar.update(self._task, completed=progress.num_rows, total=progress.num_work_rows, description=line)

    def say(self, message: str) -> None:
        self._bar.console.print(message, markup=False, highlight=False)
