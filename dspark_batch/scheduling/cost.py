"""What a step and a draft cost now: a measured table, bent and scaled by the engine's own times."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost_table import CostSurface, CostTable, DraftSample, interpolate, monotone

Floats = NDArray[np.float64]

KNOTS = (
    *range(1, 16),
    *(octave * part for octave in (2, 4, 8, 16, 32) for part in range(8, 16)),
    512,
    1024,
    2048,
    4096,
)
"""Flat tokens at which the correction of the table is kept; linear in between."""

_SLOPE_PRIOR = 4.0
_KNOT_PRIOR = 20.0
_LOG_KNOTS: Floats = np.log(KNOTS)
_BOUNDS = tuple(math.sqrt(low * high) for low, high in pairwise(KNOTS))
_WINDOW = 21
_PRIOR_STEPS = 4
_LEVEL_RATE = 0.3
_STEPS_PER_FIT = 4
_MAX_LOG_SURPRISE = 0.7
_TRUSTED_LOG_SURPRISE = 0.25
_MAX_LOG_BEND = 2.0
_FORGET = 0.98
_CALLS_PER_FIT = 8
_MAX_DRAFT_SURPRISE = 3.0
_DRAFT_LEVEL_RATE = 0.1


class Seen(Enum):
    """Whether a size of steps was seen, and took about what was expected."""

    NEVER = auto()
    AS_EXPECTED = auto()
    DIFFERENT = auto()


@dataclass(slots=True)
class _Bend:
    """Observed over tabulated at the knots of one octave of rows; ``logs``: at all of them, made when asked for."""

    ratios: dict[int, deque[float]] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)
    last_surprise: dict[int, float] = field(default_factory=dict)
    logs: list[float] | None = None

    def curve(self) -> list[float]:
        """[knots] logs: a line in the logarithm of the tokens, and of what each observed knot adds to it the part that
        its number of steps vouches for; carried over from the nearest observed knots where a knot has none.

        The median at one knot is noisier than what a token more costs at a few rows: a knot that happens to look dear
        would not be visited again.
        """
        if not self.medians:
            return [0.0] * len(KNOTS)
        if self.logs is None:
            seen = sorted(self.medians)
            weights = np.array([len(self.ratios[knot]) for knot in seen], np.float64)
            x, y = _LOG_KNOTS[seen], np.log([self.medians[knot] for knot in seen])
            mean_x, mean_y = (float(weights @ values / weights.sum()) for values in (x, y))
            slope = float(weights @ ((x - mean_x) * (y - mean_y)) / (weights @ (x - mean_x) ** 2 + _SLOPE_PRIOR))
            rest = (y - mean_y - slope * (x - mean_x)) * weights / (weights + _KNOT_PRIOR)
            line = mean_y + slope * (np.clip(_LOG_KNOTS, x[0], x[-1]) - mean_x)
            table = line + np.interp(np.arange(len(KNOTS)), seen, rest)
            self.logs = np.clip(table, -_MAX_LOG_BEND, _MAX_LOG_BEND).tolist()
        return self.logs


class StepCost:
    """Seconds of a step without its drafting, by flat tokens, rows and mean context; never falls with more tokens.

    It is the table's shape, bent, times a level. The level follows every step at once, so that a machine that slows
    down does not bend the shape. The bend is fitted to the medians of recent steps over the table at each number of
    flat tokens, relative to the level, and apart for every octave of rows.
    """

    def __init__(self, table: CostTable) -> None:
        self._surface = CostSurface(table.steps)
        self._log_level = 0.0
        self._num_observed = 0
        self._bends: dict[int, _Bend] = {}

    def observe(self, num_tokens: int, seconds: float, *, num_rows: int, context_tokens: float) -> None:
        """One step's flat tokens and its time. Ignores steps without a time (a clock too coarse)."""
        if seconds <= 0:
            return
        bend = self._bends.setdefault(num_rows.bit_length(), _Bend())
        tabulated = self._surface.at(num_tokens, num_rows=num_rows, context_tokens=context_tokens)
        expected = interpolate(num_tokens, KNOTS, bend.curve())
        surprise = math.log(seconds / tabulated) - expected - self._log_level
        if self._num_observed == 0:
            self._log_level += surprise
            surprise = 0.0
        rate = max(_LEVEL_RATE, 1.0 / (self._num_observed + 1))
        self._log_level += rate * max(-_MAX_LOG_SURPRISE, min(_MAX_LOG_SURPRISE, surprise))
        self._num_observed += 1
        knot = _nearest(num_tokens)
        before = bend.medians.get(knot, math.exp(expected))
        # A new knot begins as its neighbours are, so that what a change of level does is not taken for its shape.
        window = bend.ratios.setdefault(knot, deque([before] * _PRIOR_STEPS, maxlen=_WINDOW))
        window.append(before * math.exp(surprise))
        bend.medians[knot] = sorted(window)[len(window) // 2]
        bend.last_surprise[knot] = surprise
        if self._num_observed % _STEPS_PER_FIT == 0 or self._num_observed < 2 * _STEPS_PER_FIT:
            bend.logs = None

    def seconds(self, num_tokens: Floats | Sequence[float], *, num_rows: int, context_tokens: float) -> Floats:
        """[N] rising flat tokens, not necessarily whole, of ``num_rows`` rows -> [N] seconds."""
        at = np.asarray(num_tokens, np.float64)
        bend = self._bends.get(num_rows.bit_length())
        out = self._surface.seconds(at, num_rows=num_rows, context_tokens=context_tokens)
        if bend is not None:
            out = np.maximum.accumulate(out * np.exp(np.interp(at, KNOTS, bend.curve())))
        return out * math.exp(self._log_level)

    def at(self, num_tokens: Sequence[float], *, num_rows: int, context_tokens: float) -> list[float]:
        """``seconds`` of a few numbers of flat tokens, without a call into numpy."""
        bend = self._bends.get(num_rows.bit_length())
        curve = bend.curve() if bend is not None else None
        out: list[float] = []
        for tokens in num_tokens:
            seconds = self._surface.at(tokens, num_rows=num_rows, context_tokens=context_tokens)
            if curve is not None:
                seconds *= math.exp(interpolate(tokens, KNOTS, curve))
            out.append(max(seconds, out[-1]) if out else seconds)
        level = math.exp(self._log_level)
        return [seconds * level for seconds in out]

    def share_of_rows(self, *, num_rows: int, context_tokens: float) -> float:
        """The share of a plain step that grows with its rows, 0 to 1, by the table; the rest is read for one row as for
        many."""
        if num_rows == 1:
            return 1.0
        one_s, all_s = (self._surface.at(n, num_rows=n, context_tokens=context_tokens) for n in (1, num_rows))
        return min(1.0, max(0.0, num_rows / (num_rows - 1) * (1.0 - one_s / all_s)))

    def seen(self, num_tokens: int, *, num_rows: int) -> Seen:
        """What a step of about this size was like when it was last seen."""
        bend = self._bends.get(num_rows.bit_length())
        surprise = bend.last_surprise.get(_nearest(num_tokens)) if bend is not None else None
        if surprise is None:
            return Seen.NEVER
        return Seen.AS_EXPECTED if abs(surprise) < _TRUSTED_LOG_SURPRISE else Seen.DIFFERENT


class DraftCost:
    """Seconds of one drafting call, by rows and by the longest draft.

    samples: measured before (``CostTable.drafts``); they are scaled by what calls take now. Without any, a linear
    function is fitted to the calls: it fits a drafter whose cost grows with each token and one that drafts a block.
    """

    def __init__(self, samples: Sequence[DraftSample] = ()) -> None:
        self._table = _DraftTable(samples) if samples else None
        self._log_level = 0.0
        self._moments = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._weights: Floats = np.zeros(3)
        self._num_observed = 0

    @property
    def is_known(self) -> bool:
        """Whether ``seconds`` rests on more than the first calls."""
        return self._table is not None or self._num_observed > 2

    def observe(self, num_rows: int, longest: int, seconds: float) -> None:
        """Without samples the first calls are left out: they pay for memory and caches."""
        self._num_observed += 1
        if self._table is not None:
            if seconds > 0:
                surprise = math.log(seconds / self._table.seconds(num_rows, longest)) - self._log_level
                self._log_level += _DRAFT_LEVEL_RATE * max(-_MAX_LOG_SURPRISE, min(_MAX_LOG_SURPRISE, surprise))
            return
        if self._num_observed <= 2:
            self._weights = np.array([seconds, 0.0, 0.0])
            return
        expected = self.seconds(num_rows, longest)
        if self._num_observed > 4 and expected > 0:
            seconds = min(seconds, _MAX_DRAFT_SURPRISE * expected)
        features = np.array([1.0, num_rows, longest])
        self._moments = _FORGET * self._moments + np.outer(features, features)
        self._targets = _FORGET * self._targets + features * seconds
        if self._num_observed % _CALLS_PER_FIT == 0 or self._num_observed < 2 * _CALLS_PER_FIT:
            ridge = np.diag([1e-6, 1e-2, 1e-2])
            self._weights = np.linalg.solve(self._moments + ridge, self._targets).astype(np.float64)

    def seconds(self, num_rows: int, longest: int) -> float:
        """0 for nothing, and before the first call was seen."""
        if not num_rows or not longest:
            return 0.0
        if self._table is not None:
            return self._table.seconds(num_rows, longest) * math.exp(self._log_level)
        return max(0.0, float(self._weights @ (1.0, num_rows, longest)))


class _DraftTable:
    """Seconds by rows at each measured draft length; linear in between, the last slope beyond."""

    def __init__(self, samples: Sequence[DraftSample]) -> None:
        self._lengths: list[int] = []
        self._by_length: list[tuple[list[int], list[float]]] = []
        by_length = sorted(samples, key=lambda s: (s.num_tokens, s.num_rows))
        for length, of_length in groupby(by_length, key=lambda s: s.num_tokens):
            points = list(of_length)
            seconds = monotone(np.array([p.seconds for p in points]), np.ones(len(points)))
            self._lengths.append(length)
            self._by_length.append(([p.num_rows for p in points], seconds.tolist()))

    def seconds(self, num_rows: int, longest: int) -> float:
        times = [_line(rows, seconds, num_rows) for rows, seconds in self._by_length]
        return interpolate(longest, self._lengths, times)


def _line(at: Sequence[int], values: Sequence[float], x: int) -> float:
    inside = interpolate(x, at, values)
    if x <= at[-1]:
        return inside
    if len(at) == 1:
        return inside * x / at[-1]
    return inside + (x - at[-1]) * (values[-1] - values[-2]) / (at[-1] - at[-2])


def _nearest(num_tokens: int) -> int:
    return bisect_left(_BOUNDS, num_tokens)
