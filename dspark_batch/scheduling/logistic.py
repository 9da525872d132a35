"""The chance of every drafted token, fitted online: a logistic regression on what the drafter says of it.

It says one or both of: a **confidence** (a trained head's, or counts), and the **margin**, by which the draft's best
score leads the next one. Each adds to the other: the head has seen the target's features, the margin knows the draft.
Fitting a curve to the margin online was reported to rank better than a trained head (vLLM, online acceptance
estimator).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import mul

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
_FEWEST_PER_FIT = 24
_MOST_PER_FIT = 256
_GROWTH_PER_FIT = 0.5
_NEWTON_STEPS = 8
_LARGEST_STEP = 1.5
_SMALLEST_STEP = 1e-3
_EPSILON = 1e-4
_MAX_LOGIT = 30.0

_PRIORS = {
    (True, False): (-0.3, 1.0),
    (False, True): (-0.8, 1.4, 0.0),
    (True, True): (-1.2, 0.6, 1.2, 0.4, 0.5, 0.5),
}
"""Weights of the features before anything was seen, by has_confidence and has_margin. Where both are said: what fitted
the embedded drafter over chat and code, at temperatures 0 and 1. Else a drafter's word counts for a little less than it
says until it is checked."""


def prior_weights(*, has_confidence: bool, has_margin: bool) -> tuple[float, ...]:
    """[D] weights of the columns of :func:`token_features`, for a drafter that says at least one of the two."""
    return _PRIORS[has_confidence, has_margin]


def token_features(position: Ints, *, confidence: Floats | None, margin: Floats | None) -> Floats:
    """[N] draft positions, and what was said of the tokens there, [N] each -> [N, D].

    Flat arrays hold one draft after the other, positions rising from 0 by one within each. A token's features depend
    on nothing after it. The margin's curve is not quite a logistic one, so its square is a feature too. Drafts whose
    margin is NaN have none; beside others that have one, their confidences are weighed apart.
    """
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


def draft_features(confidence: Sequence[float] | None, margin: Sequence[float] | None) -> Iterator[list[float]]:
    """The rows of :func:`token_features` for the tokens of one draft, made one by one: for few tokens, calls into
    numpy take longer than the arithmetic."""
    assert confidence is not None or margin is not None, "nothing was said of the draft"
    has_both = confidence is not None and margin is not None
    chances = repeat(0.5) if confidence is None else confidence
    margins = repeat(0.0) if margin is None else margin
    logits = leads = 0.0
    for k, (said, lead) in enumerate(zip(chances, margins, strict=False)):
        chance = min(max(said, _EPSILON), 1 - _EPSILON)
        has_none = lead != lead
        logit, log_lead = math.log(chance / (1 - chance)), math.log1p(0.0 if has_none else max(lead, 0.0))
        weight = 1.0 + _PREDECESSOR_WEIGHT * k
        x = (logit + _PREDECESSOR_WEIGHT * logits) / weight
        y = (log_lead + _PREDECESSOR_WEIGHT * leads) / weight
        logits, leads = logits + logit, leads + log_lead
        if has_both:
            yield [1.0, x, y, y * y, float(has_none), x if has_none else 0.0]
        else:
            yield [1.0, x] if margin is None else [1.0, y, y * y]


class PositionLogistic:
    """P(token at position k holds | those before it hold) = sigmoid((w + d_k) · features), for K positions.

    w is shared and d_k, which is pulled to zero, is the position's own; so positions with few labels lean on the
    others. prior: [D] where w is pulled to.

    The posterior is kept as a Gaussian (its mode and curvature), so old labels need not be kept: each fit is a
    penalised maximum likelihood of the new ones, by Newton's method.
    """

    def __init__(self, num_positions: int, prior: Sequence[float]) -> None:
        self._num_positions, size = num_positions, len(prior)
        self._shared: Floats = np.array(prior, np.float64)
        self._own: Floats = np.zeros((num_positions, size))
        self._curvature: Floats = np.zeros((num_positions, size, size))
        self._num_labels = 0.0
        self._waiting: list[tuple[Floats, Ints, Bools]] = []
        self._num_waiting = 0
        self._weight_rows: list[list[float]] | None = None

    def chances(self, features: Floats, position: Ints) -> Floats:
        """[N, D] features at [N] draft positions -> [N] conditional chances."""
        return _sigmoid((features * self.weights[position]).sum(1))

    def num_above(self, draft: Iterable[Sequence[float]], least_survival: float) -> int:
        """Tokens of one draft, by their features, that stand with all before them with at least this chance."""
        if self._weight_rows is None:
            self._weight_rows = self.weights.tolist()
        survival, length = 1.0, 0
        for features, weights in zip(draft, self._weight_rows, strict=False):
            logit = sum(map(mul, features, weights))
            survival /= 1.0 + math.exp(min(max(-logit, -_MAX_LOGIT), _MAX_LOGIT))
            if survival < least_survival:
                break
            length += 1
        return length

    def observe(self, features: Floats, position: Ints, held: Bools) -> None:
        """[N, D], [N], [N] of tokens that were reached (verified, and all before them held), and whether they held."""
        if not len(position):
            return
        self._waiting.append((features, position, held))
        self._num_waiting += len(position)
        if self._num_waiting >= min(max(_FEWEST_PER_FIT, _GROWTH_PER_FIT * self._num_labels), _MOST_PER_FIT):
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
        before, shared, own, curvature = self._curvature, self._shared, self._own, self._curvature
        for _ in range(_NEWTON_STEPS):
            chance = _sigmoid((features * (shared + own)[position]).sum(1))
            curvature = before + (is_at @ (squares * (chance * (1 - chance))[:, None])).reshape(before.shape)
            slope = is_at @ (features * (chance - held)[:, None])
            # The Gaussian of the old labels pulls to where it was fitted.
            moved_shared, moved_own = shared - self._shared, own - self._own
            slope += np.einsum("kde,ke->kd", before, moved_shared + moved_own)
            slope_shared = slope.sum(0) + _SHARED_PRIOR_WEIGHT * moved_shared
            step_shared, step_own = _solve_arrow(curvature, slope_shared, slope + _OWN_PRIOR_WEIGHT * moved_own)
            largest = max(float(np.abs(step_shared).max()), float(np.abs(step_own).max()))
            scale = _LARGEST_STEP / max(largest, _LARGEST_STEP)
            shared, own = shared - scale * step_shared, own - scale * step_own
            if largest < _SMALLEST_STEP:
                break
        self._shared, self._own, self._curvature = shared, own, curvature
        self._weight_rows = None

    @property
    def weights(self) -> Floats:
        """[K, D] of the features at each position."""
        out: Floats = self._shared + self._own
        return out

    def _fade(self, factor: float) -> None:
        self._num_labels *= factor
        self._curvature = factor * self._curvature


def _solve_arrow(curvature: Floats, shared: Floats, own: Floats) -> tuple[Floats, Floats]:
    """x of A x = b, where A is the curvature of shared and own weights with that of their priors.

    curvature: [K, D, D] of the labels at each position: in A the shared weights have their sum, each position's own
    weights its part, and the two meet in that part. shared, own: [D] and [K, D], of b. So no system has more than D
    unknowns.
    """
    eye = np.eye(len(shared))
    solved = np.linalg.solve(curvature + _OWN_PRIOR_WEIGHT * eye, np.concatenate([curvature, own[:, :, None]], axis=2))
    by_shared, by_own = solved[:, :, :-1], solved[:, :, -1]
    rest = _SHARED_PRIOR_WEIGHT * eye + (curvature - curvature @ by_shared).sum(0)
    found = np.linalg.solve(rest, shared - np.einsum("kde,ke->d", curvature, by_own))
    return found, by_own - by_shared @ found


def with_predecessors(x: Floats, position: Ints) -> Floats:
    """[N, S] -> [N, S]: means of each x and, less weighty, of those before it in its draft."""
    before = x.cumsum(0) - x
    before -= before[np.arange(len(x)) - position]
    out: Floats = (x + _PREDECESSOR_WEIGHT * before) / (1.0 + _PREDECESSOR_WEIGHT * position)[:, None]
    return out


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(np.minimum(np.maximum(-x, -_MAX_LOGIT), _MAX_LOGIT)))
    return out
