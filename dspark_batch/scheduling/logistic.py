"""A logistic curve for every draft position, fitted online: from a signal of the drafter to a chance of acceptance.

The signal is the lead of the draft's best token over the next one (the top-2 margin), for drafters that have logits and
no confidence head, or the head's own confidence, which it then corrects. Fitting such a curve to the margin online was
reported to rank better than a trained head (vLLM, online acceptance estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PREDECESSOR_WEIGHT = 0.2
"""Of each earlier signal of the same draft in the x of a position. Rows and places differ in ease, and a noisy signal
does not say all of it: without its predecessors, products of chances are too low for easy drafts and too high for hard
ones."""

_MEMORY_LABELS = 4000.0
"""Labels that a position remembers; older ones fade."""

_POSITION_WEIGHT = 8.0
_PRIOR_WEIGHT = 8.0
_LABELS_PER_FIT = 24
_GROWTH_PER_FIT = 0.1
_NEWTON_STEPS = 4
_LARGEST_STEP = 1.5
_EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class Signal:
    """transform: [N] signals -> [N] numbers x of order 1. edges: of the bins in which x is counted. bias, slope: the
    curve sigmoid(bias + slope x) that is assumed before anything was seen."""

    transform: Callable[[Floats], Floats]
    edges: tuple[float, ...]
    bias: float
    slope: float


def _log_margin(margin: Floats) -> Floats:
    out: Floats = np.log1p(np.maximum(margin, 0.0))
    return out


def _logit(confidence: Floats) -> Floats:
    clipped = np.clip(confidence, _EPSILON, 1 - _EPSILON)
    out: Floats = np.log(clipped) - np.log1p(-clipped)
    return out


MARGIN = Signal(_log_margin, tuple(np.linspace(0.1, 3.1, 16).tolist()), bias=-0.8, slope=1.4)
CONFIDENCE = Signal(_logit, tuple(np.linspace(-4.0, 6.0, 21).tolist()), bias=-0.3, slope=1.0)
"""Confidences are believed but for a little: until it is checked, a drafter's word counts for less."""


class PositionLogistic:
    """P(position k holds | those before it hold) = sigmoid(bias_k + slope_k x), for K positions.

    x is the mean of the transformed signals up to k, the earlier ones of the same draft with a small weight; so it
    depends on nothing after k. Flat arrays hold one draft after the other, positions rising by one within each.

    Labels are counted in bins of x, so a fit costs the same however many there were. A position with few labels leans
    on the fit over all positions, and that on the signal's prior.
    """

    def __init__(self, num_positions: int, signal: Signal) -> None:
        self._signal = signal
        self._edges = np.array(signal.edges)
        shape = (num_positions, len(signal.edges) + 1)
        self._tried, self._held, self._sum_x = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._prior: Floats = np.array([[signal.bias, signal.slope]])
        self._all = self._prior.copy()
        self._curves: Floats = np.repeat(self._prior, num_positions, axis=0)
        self._num_since_fit = 0

    def chances(self, signal: Floats, position: Ints) -> Floats:
        """[N] signals at [N] draft positions -> [N] conditional chances."""
        due = max(_LABELS_PER_FIT, _GROWTH_PER_FIT * float(self._tried.sum()))
        if self._num_since_fit >= due:
            self.fit()
        x = with_predecessors(self._signal.transform(signal), position)
        return _sigmoid(self._curves[position, 0] + self._curves[position, 1] * x)

    def observe(self, signal: Floats, position: Ints, held: Bools) -> None:
        """[N] signals of tokens that were reached (verified, and all before them held), and whether they held."""
        if not len(signal):
            return
        x = with_predecessors(self._signal.transform(signal), position)
        num_positions, num_bins = self._tried.shape
        flat = position * num_bins + np.searchsorted(self._edges, x)
        size = num_positions * num_bins
        new = np.bincount(flat, minlength=size).reshape(num_positions, num_bins)
        total = self._tried.sum(1) + new.sum(1)
        fade = np.minimum(1.0, _MEMORY_LABELS / np.maximum(total, 1.0))[:, None]
        self._tried = fade * (self._tried + new)
        self._held = fade * (self._held + np.bincount(flat, held, minlength=size).reshape(new.shape))
        self._sum_x = fade * (self._sum_x + np.bincount(flat, x, minlength=size).reshape(new.shape))
        self._num_since_fit += len(signal)

    def age(self) -> None:
        """Trust what was counted half as much: drafting paused, and things may have changed."""
        for counts in (self._tried, self._held, self._sum_x):
            counts *= 0.5

    def fit(self) -> None:
        """Bring the curves up to date. ``chances`` does so by itself every so many labels."""
        self._num_since_fit = 0
        pooled = [counts.sum(0, keepdims=True) for counts in (self._tried, self._held, self._sum_x)]
        self._all = fit_curves(*pooled, prior=self._prior, weight=_PRIOR_WEIGHT, start=self._all)
        self._curves = fit_curves(
            self._tried, self._held, self._sum_x, prior=self._all, weight=_POSITION_WEIGHT, start=self._curves
        )

    @property
    def curves(self) -> Floats:
        """[K, 2]: bias and slope of each position."""
        return self._curves


def with_predecessors(x: Floats, position: Ints) -> Floats:
    """[N] -> [N] means of each x and, less weighty, of those before it in the same run of rising positions."""
    if not len(x):
        return x
    is_first = np.diff(position, prepend=position[0]) != 1
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(x)), 0))
    before = np.cumsum(x) - x
    before -= before[first]
    weight = _PREDECESSOR_WEIGHT * (np.arange(len(x)) - first)
    out: Floats = (x + _PREDECESSOR_WEIGHT * before) / (1.0 + weight)
    return out


def fit_curves(tried: Floats, held: Floats, sum_x: Floats, *, prior: Floats, weight: float, start: Floats) -> Floats:
    """Penalised maximum likelihood of K logistic curves by Newton's method, [K, 2]: bias and slope.

    tried, held, sum_x: [K, B], labels in each bin, those that held, and the sum of their x. prior: [1 or K, 2], to
    which ``weight`` / 2 times the squared distance pulls. start: [K, 2], from where a few steps are taken.
    """
    x = sum_x / np.maximum(tried, 1e-9)
    curves = start.copy()
    for _ in range(_NEWTON_STEPS):
        chance = _sigmoid(curves[:, :1] + curves[:, 1:] * x)
        miss = tried * chance - held
        pull = weight * (curves - prior)
        slope_b, slope_a = miss.sum(1) + pull[:, 0], (miss * x).sum(1) + pull[:, 1]
        spread = tried * chance * (1 - chance)
        bb, ba, aa = spread.sum(1) + weight, (spread * x).sum(1), (spread * x * x).sum(1) + weight
        determinant = bb * aa - ba * ba
        step = np.stack((aa * slope_b - ba * slope_a, bb * slope_a - ba * slope_b), axis=1) / determinant[:, None]
        curves -= np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
    return curves


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
    return out
