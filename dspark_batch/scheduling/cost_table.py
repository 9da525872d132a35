"""What steps and drafts cost on one device, as measured: seconds by context, rows and flat tokens; drafts by rows.

Two dimensions of the batch are needed: eight tokens of one row read one row's keys, eight rows read eight. A table by
flat tokens alone prices every drafted token as a new row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, order=True)
class StepSample:
    """Seconds of a target step (logits and draws included) in which ``num_rows`` rows, each with ``context_tokens`` of
    KV, compute ``num_tokens`` tokens in all."""

    context_tokens: int
    num_rows: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, order=True)
class DraftSample:
    """Seconds in which the drafter makes ``num_tokens`` tokens for each of ``num_rows`` rows."""

    num_rows: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured medians. ``drafts`` is empty for a drafter without a forward of its own.

    Raises:
        ValueError: a figure is out of range, or nothing was measured.
    """

    steps: tuple[StepSample, ...]
    drafts: tuple[DraftSample, ...] = ()

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a cost table needs at least one measured step")
        for step in self.steps:
            if not 1 <= step.num_rows <= step.num_tokens or step.context_tokens < 0 or not _is_time(step.seconds):
                raise ValueError(f"not a measured step: {step}")
        for draft in self.drafts:
            if draft.num_rows < 1 or draft.num_tokens < 1 or not _is_time(draft.seconds):
                raise ValueError(f"not a measured draft: {draft}")

    @property
    def most_rows(self) -> int:
        return max(step.num_rows for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` reads it."""
        return {
            "steps": [[s.context_tokens, s.num_rows, s.num_tokens, s.seconds] for s in self.steps],
            "drafts": [[d.num_rows, d.num_tokens, d.seconds] for d in self.drafts],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostTable:
        """Raises ValueError, TypeError or KeyError for anything that :meth:`as_dict` does not write."""
        steps = [StepSample(int(c), int(r), int(t), float(s)) for c, r, t, s in values["steps"]]
        drafts = [DraftSample(int(r), int(t), float(s)) for r, t, s in values["drafts"]]
        return cls(tuple(sorted(steps)), tuple(sorted(drafts)))

    @classmethod
    def from_function(
        cls,
        step_s: Callable[[int, int, int], float],
        *,
        rows: Sequence[int],
        tokens_per_row: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 17),
        contexts: Sequence[int] = (128,),
        draft_s: Callable[[int, int], float] | None = None,
        draft_tokens: int = 1,
    ) -> CostTable:
        """A made-up table, for tests and simulations. step_s: (tokens, rows, context) -> seconds. draft_s: (rows,
        tokens) -> seconds."""
        steps = [
            StepSample(context, num_rows, num_rows * per_row, step_s(num_rows * per_row, num_rows, context))
            for context in contexts
            for num_rows in rows
            for per_row in tokens_per_row
        ]
        drafts: list[DraftSample] = []
        if draft_s is not None:
            drafts = [DraftSample(n, k, draft_s(n, k)) for n in rows for k in sorted({1, draft_tokens})]
        return cls(tuple(steps), tuple(drafts))


class CostSurface:
    """A table as a function. Per context and rows a curve over flat tokens, nondecreasing and piecewise linear.

    Between two numbers of rows, and between two contexts, curves are blended at the same number of flat tokens, so that
    the stairs of a device stay where they are. Past the last point the last slope goes on.
    """

    def __init__(self, steps: Iterable[StepSample]) -> None:
        self._contexts: list[int] = []
        self._rows: list[list[int]] = []
        self._curves: list[list[_Curve]] = []
        for context, of_context in groupby(sorted(steps), key=lambda step: step.context_tokens):
            rows: list[int] = []
            curves: list[_Curve] = []
            for num_rows, of_rows in groupby(of_context, key=lambda step: step.num_rows):
                points = list(of_rows)
                curve = _Curve([p.num_tokens for p in points], [p.seconds for p in points])
                rows.append(num_rows)
                curves.append(curve.at_least(curves[-1]) if curves else curve)
            self._contexts.append(context)
            self._rows.append(rows)
            self._curves.append(curves)
        self._knots = [np.unique(np.concatenate([c.tokens for c in curves])) for curves in self._curves]
        self._lines: dict[tuple[int, int], _Curve] = {}
        self._gaps: dict[tuple[int, int], _Points] = {}

    def seconds(self, num_tokens: Floats, *, num_rows: int, context_tokens: float) -> Floats:
        """[N] rising flat tokens of ``num_rows`` rows with a mean context of so many tokens -> [N] seconds."""
        line, gap = self._parts(num_rows, context_tokens)
        at_low = line(num_tokens)
        if gap is None:
            return at_low
        both: Floats = np.maximum.accumulate(at_low + gap.share * np.maximum(0.0, gap(num_tokens)))
        return both

    def at(self, num_tokens: float, *, num_rows: int, context_tokens: float) -> float:
        """``seconds`` of one step, without a call into numpy."""
        line, gap = self._parts(num_rows, context_tokens)
        at_low = line.at(num_tokens)
        return at_low if gap is None else at_low + gap.share * max(0.0, gap.at(num_tokens))

    def _parts(self, num_rows: int, context_tokens: float) -> tuple[_Curve, _Gap | None]:
        """The cost at the measured context below, and what the next one adds to it."""
        last = len(self._contexts) - 1
        low = min(max(bisect_right(self._contexts, context_tokens) - 1, 0), max(last - 1, 0))
        line = self._line(low, num_rows)
        if low == last or context_tokens <= self._contexts[low]:
            return line, None
        width = self._contexts[low + 1] - self._contexts[low]
        share = (context_tokens - self._contexts[low]) / width
        # A longer context is measured at fewer sizes: there the difference counts, the stairs are those of the first.
        most = self._rows[low + 1][-1]
        return line, _Gap(self._difference(low, min(num_rows, most)), share, max(1.0, num_rows / most))

    def _line(self, index: int, num_rows: int) -> _Curve:
        """The cost at one context and number of rows, remembered: all its corners, and the slope beyond them."""
        found = self._lines.get((index, num_rows))
        if found is None:
            knots = self._knots[index]
            knots = np.append(knots[knots > num_rows], 2 * max(float(knots[-1]), num_rows))
            knots = np.concatenate([[float(num_rows)], knots])
            found = _Curve(knots, self._at_context(index, knots, num_rows), reach=1)
            self._lines[index, num_rows] = found
        return found

    def _difference(self, low: int, num_rows: int) -> _Points:
        """Seconds that the next context costs more, by flat tokens."""
        found = self._gaps.get((low, num_rows))
        if found is None:
            knots = np.maximum(self._knots[low + 1], num_rows)
            gap = self._at_context(low + 1, knots, num_rows) - self._at_context(low, knots, num_rows)
            found = self._gaps[low, num_rows] = _Points(knots, gap)
        return found

    def _at_context(self, index: int, num_tokens: Floats, num_rows: float) -> Floats:
        rows, curves = self._rows[index], self._curves[index]
        low = max(bisect_right(rows, num_rows) - 1, 0)
        lower = curves[low]
        if low == len(rows) - 1 or num_rows <= rows[low]:
            return lower(num_tokens)
        # Where only one of the two curves was measured, the other runs beside it.
        first, upper = float(rows[low + 1]), curves[low + 1]
        end = max(float(lower.tokens[-1]), first)
        at_low = lower(np.minimum(num_tokens, end)) + upper(np.maximum(num_tokens, end)) - upper.at(end)
        at_high = upper(np.maximum(num_tokens, first)) + lower(np.minimum(num_tokens, first)) - lower.at(first)
        # More rows never make as many tokens cheaper, where a steep curve that goes on past its points says so.
        at_high = np.maximum(at_low, at_high)
        share = (num_rows - rows[low]) / (first - rows[low])
        blended: Floats = (1.0 - share) * at_low + share * at_high
        return blended


class _Points:
    """Linear between points, level beyond them."""

    def __init__(self, at: Floats, values: Floats) -> None:
        self._at, self._values = at, values
        self._lists: tuple[list[float], list[float]] = (at.tolist(), values.tolist())

    def __call__(self, x: Floats) -> Floats:
        found: Floats = np.interp(x, self._at, self._values)
        return found

    def at(self, x: float) -> float:
        return interpolate(x, *self._lists)


@dataclass(frozen=True, slots=True)
class _Gap:
    """What a longer context adds: ``share`` of the points, which are measured up to 1 / ``scale`` of the rows."""

    points: _Points
    share: float
    scale: float

    def __call__(self, num_tokens: Floats) -> Floats:
        return self.scale * self.points(num_tokens / self.scale)

    def at(self, num_tokens: float) -> float:
        return self.scale * self.points.at(num_tokens / self.scale)


class _Curve:
    """Nondecreasing, through the points that a weighted fit allows; linear in between and beyond."""

    def __init__(self, tokens: Sequence[int] | Floats, seconds: Sequence[float] | Floats, *, reach: int = 0) -> None:
        """reach: points that the slope beyond the last one spans; 0: an octave, since two may lie on one stair."""
        self.tokens: Floats = np.asarray(tokens, np.float64)
        times: Floats = np.asarray(seconds, np.float64)
        self._seconds = monotone(times, np.ones(len(times)))
        self._points = _Points(self.tokens, self._seconds)
        # Without a second point a step grows with its tokens, as a saturated device would have it.
        self._slope = float(self._seconds[0] / self.tokens[0])
        self._last = float(self.tokens[-1])
        if len(self.tokens) > 1:
            first = (
                int(np.searchsorted(self.tokens, self.tokens[-1] / 2)) if not reach else len(self.tokens) - 1 - reach
            )
            first = min(first, len(self.tokens) - 2)
            run = float(self.tokens[-1] - self.tokens[first])
            self._slope = float(self._seconds[-1] - self._seconds[first]) / run

    def __call__(self, num_tokens: Floats) -> Floats:
        beyond: Floats = np.maximum(0.0, num_tokens - self._last)
        return self._points(num_tokens) + beyond * self._slope

    def at(self, num_tokens: float) -> float:
        return self._points.at(num_tokens) + max(0.0, num_tokens - self._last) * self._slope

    def at_least(self, other: _Curve) -> _Curve:
        """This curve where it lies above that of fewer rows, else that, at sizes that were measured for both."""
        both = np.isin(self.tokens, other.tokens)
        return _Curve(self.tokens, np.where(both, np.maximum(self._seconds, other(self.tokens)), self._seconds))


def interpolate(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """``np.interp`` of one number, for what is asked in every step: a call into numpy takes far longer."""
    low = bisect_right(at, x) - 1
    if low < 0:
        return values[0]
    if low == len(at) - 1:
        return values[low]
    slope = (values[low + 1] - values[low]) / (at[low + 1] - at[low])
    return slope * (x - at[low]) + values[low]


def monotone(values: Floats, weights: Floats) -> Floats:
    """The nondecreasing sequence nearest to ``values`` in weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / total, total, before[2] + block[2])
        blocks.append(block)
    return np.repeat([value for value, _, _ in blocks], [count for _, _, count in blocks])


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0
