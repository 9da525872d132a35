"""What a step costs, learned from the engine's own step times: seconds by flat tokens, and seconds of drafting."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KNOTS = (
    *range(1, 16),
    *(octave * part for octave in (2, 4, 8, 16, 32) for part in range(8, 16)),
    512,
    1024,
    2048,
    4096,
)
"""Flat tokens at which the step cost is kept; linear in between."""

_BOUNDS = tuple(math.sqrt(low * high) for low, high in pairwise(KNOTS))
_WINDOW = 21
_PRIOR_STEPS = 4
_LEVEL_RATE = 0.3
_STEPS_PER_TABLE = 4
_MAX_LOG_SURPRISE = 0.7
_FORGET = 0.98
_CALLS_PER_FIT = 8
_MAX_DRAFT_SURPRISE = 3.0


class StepCost:
    """Seconds of a step without its drafting, as a function of flat tokens: monotone, piecewise linear.

    It is a shape times a level. The level follows every step at once, so that a machine that slows down, or contexts
    that grow, do not bend the shape; the shape is the median of recent steps at each knot, relative to the level.
    Between observed knots the seed's shape counts.

    seed: measured seconds by flat tokens (``profiler.profile_steps``); None assumes that 16 tokens cost twice one until
    steps have been seen.
    """

    def __init__(self, seed: Mapping[int, float] | None = None) -> None:
        self._knots = np.array(KNOTS, float)
        self._seed = _seed_shape(seed)
        self._log_level = 0.0
        self._num_observed = 0
        self._ratios: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._last_seen: dict[int, int] = {}
        self._table: Floats | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """One step's flat tokens and its time. Ignores steps without a time (a clock too coarse)."""
        if seconds <= 0:
            return
        expected = float(self._shape_at(np.array([num_tokens]))[0])
        surprise = math.log(seconds / expected) - self._log_level
        if self._num_observed == 0:
            self._log_level += surprise
            surprise = 0.0
        rate = max(_LEVEL_RATE, 1.0 / (self._num_observed + 1))
        self._log_level += rate * max(-_MAX_LOG_SURPRISE, min(_MAX_LOG_SURPRISE, surprise))
        self._num_observed += 1
        knot = self._nearest(num_tokens)
        correction = self._medians.get(knot)
        if correction is None:
            correction = math.exp(float(self._log_ratios(np.array([knot]))[0]))
        # A new knot begins as its neighbours are, so that what a change of level does is not taken for its shape.
        window = self._ratios.setdefault(knot, deque([correction] * _PRIOR_STEPS, maxlen=_WINDOW))
        window.append(correction * math.exp(surprise))
        self._medians[knot] = sorted(window)[len(window) // 2]
        self._last_seen[knot] = self._num_observed
        if self._num_observed % _STEPS_PER_TABLE == 0 or self._num_observed < 2 * _STEPS_PER_TABLE:
            self._table = None

    def seconds(self, num_tokens: NDArray[np.int64] | NDArray[np.float64]) -> Floats:
        """[N] flat tokens, not necessarily whole -> [N] seconds."""
        return self._shape_at(num_tokens) * math.exp(self._log_level)

    def is_known(self, num_tokens: int) -> bool:
        """Whether enough steps of about this size were seen to outweigh what was assumed."""
        return len(self._ratios.get(self._nearest(num_tokens), ())) > 2 * _PRIOR_STEPS

    def steps_since(self, num_tokens: int) -> int | None:
        """Steps seen since one of about this size, or None if there was none."""
        seen = self._last_seen.get(self._nearest(num_tokens))
        return None if seen is None else self._num_observed - seen

    def _shape_at(self, num_tokens: NDArray[np.int64] | NDArray[np.float64]) -> Floats:
        if self._table is None:
            weights = np.full(len(KNOTS), 0.5)
            for knot, window in self._ratios.items():
                weights[knot] += len(window)
            self._table = monotone(self._seed * np.exp(self._log_ratios(np.arange(len(KNOTS)))), weights)
        out: Floats = np.interp(num_tokens, self._knots, self._table)
        return out

    def _log_ratios(self, knots: NDArray[np.int64]) -> Floats:
        """Log of observed over seed, carried over from the nearest observed knots where a knot has none."""
        if not self._medians:
            return np.zeros(len(knots))
        seen = sorted(self._medians)
        out: Floats = np.interp(knots, seen, np.log([self._medians[knot] for knot in seen]))
        return out

    def _nearest(self, num_tokens: int) -> int:
        return bisect_left(_BOUNDS, num_tokens)


class DraftCost:
    """Seconds of one drafting call: a linear function of rows and of the longest draft, with forgetting.

    Fits a drafter whose cost grows with each token (a draft model) and one that drafts a whole block at once.
    """

    def __init__(self) -> None:
        self._moments = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._weights: Floats = np.zeros(3)
        self._num_observed = 0

    def observe(self, num_rows: int, longest: int, seconds: float) -> None:
        """The first calls are left out: they pay for memory and caches."""
        self._num_observed += 1
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
        """0 before the first call was seen."""
        return max(0.0, float(self._weights @ (1.0, num_rows, longest)))


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


def _seed_shape(seed: Mapping[int, float] | None) -> Floats:
    """Seconds at every knot; beyond the largest measured size the last slope goes on."""
    knots: Floats = np.array(KNOTS, float)
    if not seed:
        return 1.0 + knots / 16.0
    sizes: Floats = np.array(sorted(seed), float)
    times: Floats = np.array([seed[int(size)] for size in sizes])
    shape: Floats = np.interp(knots, sizes, monotone(times, np.ones_like(times)))
    if len(sizes) > 1:
        slope = max(0.0, times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        shape += np.maximum(0.0, knots - sizes[-1]) * slope
    else:
        shape *= np.maximum(1.0, knots / sizes[-1])
    return shape
