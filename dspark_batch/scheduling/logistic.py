"""The chance of every drafted token, fitted online: a logistic regression on what the drafter says of it.

It says one or both of: a **confidence** (a trained head's, or counts), and the **margin**, by which the draft's best
score leads the next one. Each adds to the other: the head has seen the target's features, the margin knows the draft.
Fitting a curve to the margin online was reported to rank better than a trained head (vLLM, online acceptance
estimator).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PREDECESSOR_WEIGHT = 0.1
"""Of each earlier token's signal in that of a token of the same draft. Rows and places differ in ease, and a noisy
signal does not say all of it: without its predecessors, products of chances are too low for easy drafts and too high
for hard ones."""

_MEMORY_LABELS = 4000.0
"""Labels for each position that are remembered; older ones fade."""

_SHARED_PRIOR_WEIGHT = 1.0
_OWN_PRIOR_WEIGHT = 8.0
_LABELS_PER_FIT = 24
_GROWTH_PER_FIT = 0.05
_NEWTON_STEPS = 8
_LARGEST_STEP = 1.5
_SMALLEST_STEP = 1e-3
_EPSILON = 1e-4
_FEW_TOKENS = 64

_PRIORS = {
    (True, False): (-0.3, 1.0),
    (False, True): (-0.8, 1.4, 0.0),
    (True, True): (-0.8, 0.5, 0.7, 0.0, 0.5, 0.5),
}
"""Weights of the features before anything was seen, by has_confidence and has_margin. Until it is checked, a drafter's
word counts for a little less than it says."""


def prior_weights(*, has_confidence: bool, has_margin: bool) -> tuple[float, ...]:
    """[D] weights of the columns of :func:`token_features`, for a drafter that says at least one of the two."""
    return _PRIORS[has_confidence, has_margin]


def token_features(position: Ints, *, confidence: Floats | None, margin: Floats | None) -> Floats:
    """[N] draft positions, and what was said of the tokens there, [N] each -> [N, D].

    Flat arrays hold one draft after the other, positions rising from 0 by one within each. A token's features depend
    on nothing after it. The margin's curve is not quite a logistic one, so its square is a feature too. Drafts whose
    margin is NaN have none; beside others that have one, their confidences are weighed apart.
    """
    if len(position) <= _FEW_TOKENS:
        return few_token_features(position, confidence=confidence, margin=margin)
    return many_token_features(position, confidence=confidence, margin=margin)


def few_token_features(position: Ints, *, confidence: Floats | None, margin: Floats | None) -> Floats:
    """:func:`token_features` token by token: for few of them, calls into numpy take longer than the arithmetic."""
    chances = [0.5] * len(position) if confidence is None else confidence.tolist()
    margins = [0.0] * len(position) if margin is None else margin.tolist()
    has_both = confidence is not None and margin is not None
    rows: list[list[float]] = []
    logits = leads = 0.0
    for k, said, lead in zip(position.tolist(), chances, margins, strict=True):
        if k == 0:
            logits = leads = 0.0
        chance = min(max(said, _EPSILON), 1 - _EPSILON)
        has_none = lead != lead
        logit, log_lead = math.log(chance / (1 - chance)), math.log1p(0.0 if has_none else max(lead, 0.0))
        weight = 1.0 + _PREDECESSOR_WEIGHT * k
        x, y = ((new + _PREDECESSOR_WEIGHT * old) / weight for new, old in ((logit, logits), (log_lead, leads)))
        logits, leads = logits + logit, leads + log_lead
        if has_both:
            rows.append([1.0, x, y, y * y, float(has_none), x if has_none else 0.0])
        else:
            rows.append([1.0, x] if margin is None else [1.0, y, y * y])
    num_columns = 6 if has_both else 2 + (margin is not None)
    return np.array(rows, np.float64).reshape(len(position), num_columns)


def many_token_features(position: Ints, *, confidence: Floats | None, margin: Floats | None) -> Floats:
    """:func:`token_features` by columns."""
    has_both = confidence is not None and margin is not None
    out: Floats = np.ones((len(position), 6 if has_both else 2 + (margin is not None)))
    if confidence is not None:
        chance = np.minimum(np.maximum(confidence, _EPSILON), 1 - _EPSILON)
        out[:, 1] = np.log(chance / (1 - chance))
    if margin is not None:
        has_none = np.isnan(margin)
        lead = np.log1p(np.maximum(np.where(has_none, 0.0, margin), 0.0))
        out[:, 1 + has_both] = lead
    num_said = 1 + has_both
    out[:, 1 : 1 + num_said] = with_predecessors(out[:, 1 : 1 + num_said], position)
    if margin is not None:
        lead = out[:, num_said]
        out[:, num_said + 1] = lead * lead
        if has_both:
            out[:, 4] = has_none
            out[:, 5] = has_none * out[:, 1]
    return out


class PositionLogistic:
    """P(token at position k holds | those before it hold) = sigmoid((w + d_k) · features), for K positions.

    w is shared and d_k, which is pulled to zero, is the position's own; so positions with few labels lean on the
    others. prior: [D] where w is pulled to.

    The posterior is kept as a Gaussian (its mode and curvature), so old labels need not be kept: each fit is a
    penalised maximum likelihood of the new ones, by Newton's method.
    """

    def __init__(self, num_positions: int, prior: Sequence[float]) -> None:
        self._num_positions, self._num_features = num_positions, len(prior)
        size = (num_positions + 1) * len(prior)
        self._mode: Floats = np.zeros(size)
        self._mode[: len(prior)] = prior
        weight = np.full(size, _OWN_PRIOR_WEIGHT)
        weight[: len(prior)] = _SHARED_PRIOR_WEIGHT
        self._prior_precision: Floats = np.diag(weight)
        self._precision = self._prior_precision.copy()
        self._num_labels = 0.0
        self._waiting: list[tuple[Floats, Ints, Bools]] = []
        self._num_waiting = 0

    def chances(self, features: Floats, position: Ints) -> Floats:
        """[N, D] features at [N] draft positions -> [N] conditional chances."""
        return _sigmoid((features * self.weights[position]).sum(1))

    def observe(self, features: Floats, position: Ints, held: Bools) -> None:
        """[N, D], [N], [N] of tokens that were reached (verified, and all before them held), and whether they held."""
        if not len(position):
            return
        self._waiting.append((features, position, held))
        self._num_waiting += len(position)
        if self._num_waiting >= max(_LABELS_PER_FIT, _GROWTH_PER_FIT * self._num_labels):
            self.fit()

    def age(self) -> None:
        """Trust what was counted half as much: drafting paused, and things may have changed."""
        self.fit()
        self._fade(0.5)

    def fit(self) -> None:
        """Bring the weights up to date. ``observe`` does so by itself every so many labels."""
        if not self._waiting:
            return
        features, position, held = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        self._num_labels += len(position)
        most = _MEMORY_LABELS * self._num_positions
        if self._num_labels > most:
            self._fade(most / self._num_labels)
        is_at: Floats = (position == np.arange(self._num_positions)[:, None]).astype(np.float64)
        squares = (features[:, :, None] * features[:, None, :]).reshape(len(position), -1)
        mode, precision = self._mode, self._precision
        for _ in range(_NEWTON_STEPS):
            chance = _sigmoid((features * self._by_position(mode)[position]).sum(1))
            miss = is_at @ (features * (chance - held)[:, None])
            spread = is_at @ (squares * (chance * (1 - chance))[:, None])
            slope = np.concatenate([miss.sum(0), miss.ravel()]) + self._precision @ (mode - self._mode)
            precision = self._precision + self._arrow(spread)
            step = np.linalg.solve(precision, slope)
            largest = float(np.abs(step).max())
            mode = mode - step * min(1.0, _LARGEST_STEP / largest) if largest else mode
            if largest < _SMALLEST_STEP:
                break
        self._mode, self._precision = mode, precision

    @property
    def weights(self) -> Floats:
        """[K, D] of the features at each position."""
        return self._by_position(self._mode)

    def _by_position(self, mode: Floats) -> Floats:
        parts = mode.reshape(self._num_positions + 1, self._num_features)
        out: Floats = parts[0] + parts[1:]
        return out

    def _arrow(self, spread: Floats) -> Floats:
        """[K, D * D] curvatures of the positions -> [(K + 1) D, (K + 1) D] of the shared and the own weights."""
        num, size = self._num_positions, self._num_features
        blocks = spread.reshape(num, size, size)
        out = np.zeros((num + 1, size, num + 1, size))
        own = np.arange(1, num + 1)
        out[0, :, 0, :] = blocks.sum(0)
        out[own, :, own, :] = out[own, :, 0, :] = out[0, :, own, :] = blocks
        return out.reshape((num + 1) * size, -1)

    def _fade(self, factor: float) -> None:
        self._num_labels *= factor
        self._precision = self._prior_precision + factor * (self._precision - self._prior_precision)


def with_predecessors(x: Floats, position: Ints) -> Floats:
    """[N, S] -> [N, S]: means of each x and, less weighty, of those before it in its draft."""
    before = x.cumsum(0) - x
    before -= before[np.arange(len(x)) - position]
    out: Floats = (x + _PREDECESSOR_WEIGHT * before) / (1.0 + _PREDECESSOR_WEIGHT * position)[:, None]
    return out


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(np.minimum(np.maximum(-x, -30.0), 30.0)))
    return out
