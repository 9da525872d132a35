"""Measures a cost table: which sizes, in which order, how often, within how many seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

from dspark_batch.scheduling.cost_table import CostTable, DraftSample, StepSample

TimeStep = Callable[[int, int, int], "float | None"]
"""(context tokens of each row, rows, flat tokens) -> seconds, or None where it does not fit."""

TimeDraft = Callable[[int, int], "float | None"]
"""(rows, tokens for each) -> seconds, or None where it does not fit."""

_MOST_PASSES = 5
_FEWEST_PASSES = 2
_STEP_LIMIT_S = 0.4
_STEEP = 1.15
_OFF_THE_LINE = 0.08
_MOST_SPLITS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes to measure. tokens_per_row: rising, from 1. contexts: rising; at the first all sizes are measured, at the
    others the smallest and one more of each number of rows. draft_lengths: of the drafts to time; () for none."""

    rows: tuple[int, ...]
    tokens_per_row: tuple[int, ...]
    contexts: tuple[int, ...]
    draft_lengths: tuple[int, ...] = ()

    @classmethod
    def for_engine(
        cls, *, most_rows: int, longest_draft: int, max_context: int, draft_lengths: tuple[int, ...] = ()
    ) -> Grid:
        """Rows by factors of four, up to ``most_rows`` itself; contexts by factors of eight, as far as the model goes.

        longest_draft: γ, so that rows verify up to γ + 1 tokens.
        """
        rows = [1]
        while rows[-1] < most_rows:
            rows.append(min(4 * rows[-1], most_rows))
        per_row = sorted({1, 2, 3, 4, 8, longest_draft + 1} & set(range(1, longest_draft + 2)))
        room = max(1, max_context - longest_draft - 1)
        contexts = [c for c in (128, 1024, 8192, 65536) if c <= room] or [room // 2]
        return cls(
            rows=tuple(rows),
            tokens_per_row=tuple(per_row),
            contexts=tuple(contexts[:3]),
            draft_lengths=draft_lengths,
        )


def measure_costs(
    grid: Grid,
    *,
    time_step: TimeStep,
    time_draft: TimeDraft | None = None,
    budget_s: float = 4.0,
    clock: Callable[[], float] = perf_counter,
) -> CostTable | None:
    """Medians of 2 to 5 passes over ``grid``; None where not even one row fits.

    All sizes take turns, so that a busy moment hits no size alone. Passes end when ``budget_s`` is spent; sizes that
    would take much longer than half a second are left to extrapolation. Then the places where a curve is steep are
    split, until it is a line or the edge of a stair is found.
    """
    started = clock()
    recorder = _Recorder(time_step)
    for number in range(_MOST_PASSES):
        pass_started = clock()
        recorder.one_pass(grid)
        if not recorder.times:
            return None
        now = clock()
        if number + 1 >= _FEWEST_PASSES and now - started + (now - pass_started) > budget_s:
            break
    recorder.split_steep(grid.contexts[0], until=started + 1.5 * budget_s, clock=clock)
    drafts: tuple[DraftSample, ...] = ()
    if time_draft is not None and grid.draft_lengths:
        drafts = _drafts(grid, time_draft, until=started + 2 * budget_s, clock=clock)
    return CostTable(recorder.samples(), drafts)


class _Recorder:
    """times: by (context, rows, tokens)."""

    def __init__(self, time_step: TimeStep) -> None:
        self._time_step = time_step
        self._is_warm = False
        self.times: dict[tuple[int, int, int], list[float]] = {}

    def one_pass(self, grid: Grid) -> None:
        for context in grid.contexts:
            per_row = grid.tokens_per_row
            if context != grid.contexts[0]:
                per_row = (1, per_row[len(per_row) // 2]) if len(per_row) > 1 else per_row
            for num_rows in grid.rows:
                if not self._row_sizes(context, num_rows, per_row):
                    break

    def _row_sizes(self, context: int, num_rows: int, per_row: Sequence[int]) -> bool:
        """Whether at least the plain step of so many rows could be timed."""
        seconds: float | None = 0.0
        before = 1
        for count in per_row:
            assert seconds is not None
            # Saturated, a step grows with its tokens.
            if seconds * count / before > _STEP_LIMIT_S and count > 2:
                break
            seconds = self.time(context, num_rows, count * num_rows)
            if seconds is None:
                return count > 1
            before = count
        return True

    def time(self, context: int, num_rows: int, num_tokens: int) -> float | None:
        if not self._is_warm:
            self._time_step(context, num_rows, num_tokens)
            self._is_warm = True
        seconds = self._time_step(context, num_rows, num_tokens)
        if seconds is not None and seconds > 0:
            self.times.setdefault((context, num_rows, num_tokens), []).append(seconds)
        return seconds

    def samples(self) -> tuple[StepSample, ...]:
        return tuple(StepSample(*size, seconds=_median(times)) for size, times in sorted(self.times.items()))

    def split_steep(self, context: int, *, until: float, clock: Callable[[], float]) -> None:
        """Look inside intervals whose ends differ much; where the middle lies on their line there is no stair."""
        for num_rows in sorted({rows for at, rows, _ in self.times if at == context}):
            sizes = sorted(tokens for at, rows, tokens in self.times if (at, rows) == (context, num_rows))
            waiting = list(pairwise(sizes))
            num_splits = 0
            while waiting and num_splits < _MOST_SPLITS:
                low, high = waiting.pop()
                if high - low < 2 or clock() > until:
                    continue
                s_low, s_high = (_median(self.times[context, num_rows, size]) for size in (low, high))
                if s_high < _STEEP * s_low or s_high > _STEP_LIMIT_S:
                    continue
                middle = (low + high) // 2
                for _ in range(_FEWEST_PASSES):
                    if self.time(context, num_rows, middle) is None:
                        break
                found = self.times.get((context, num_rows, middle))
                if found is None:
                    continue
                num_splits += 1
                line = s_low + (s_high - s_low) * (middle - low) / (high - low)
                if abs(_median(found) - line) > _OFF_THE_LINE * line:
                    waiting += [(low, middle), (middle, high)]


def _drafts(grid: Grid, time_draft: TimeDraft, *, until: float, clock: Callable[[], float]) -> tuple[DraftSample, ...]:
    times: dict[tuple[int, int], list[float]] = {}
    for number in range(_MOST_PASSES):
        for num_rows in grid.rows:
            for num_tokens in grid.draft_lengths:
                if number >= _FEWEST_PASSES and clock() > until:
                    break
                seconds = time_draft(num_rows, num_tokens)
                if seconds is not None and seconds > 0:
                    times.setdefault((num_rows, num_tokens), []).append(seconds)
    return tuple(DraftSample(*size, seconds=_median(found)) for size, found in sorted(times.items()))


def _median(times: Sequence[float]) -> float:
    """The lower one of two: a disturbance makes a step longer, never shorter."""
    value = sorted(times)[(len(times) - 1) // 2]
    assert math.isfinite(value)
    return value
