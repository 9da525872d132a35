"""The slow float64 oracle of sampling: one position at a time, whole vocabulary, sorted lists, no shortcuts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_batch.core import SamplingParams

_MASK = (1 << 64) - 1


def log_probs(logits: Sequence[float], sampling: SamplingParams, *, seen: Sequence[int] = ()) -> NDArray[np.float64]:
    """[V] float64 log-probabilities of the distribution that is sampled; -inf for tokens that are cut."""
    scores = np.asarray(logits, dtype=np.float64).copy()
    for token in set(seen):
        # In float32, as the logits are: that rounding decides which tokens tie, and tokens that tie are cut together.
        penalty, score = np.float32(sampling.repetition_penalty), np.float32(scores[token])
        scores[token] = score * penalty if score < 0 else score / penalty
    if sampling.is_greedy:
        out = np.full_like(scores, -np.inf)
        out[int(scores.argmax())] = 0.0
        return out
    scores /= sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores[scores < np.sort(scores)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1.0:
        weights = _softmax(scores)
        mass_above = np.array([weights[scores > score].sum() for score in scores])
        scores[mass_above >= sampling.top_p] = -np.inf
    if sampling.min_p:
        weights = _softmax(scores)
        scores[weights < sampling.min_p * weights.max()] = -np.inf
    with np.errstate(divide="ignore"):
        return np.log(_softmax(scores))


def draw(
    logits: Sequence[float], sampling: SamplingParams, *, noise_key: int, position: int, seen: Sequence[int]
) -> int:
    """The token at one position: argmax of log-probability plus keyed noise."""
    base = log_probs(logits, sampling, seen=seen)
    noisy = [lp + gumbel(noise_key, position, v) if lp > -np.inf else -np.inf for v, lp in enumerate(base)]
    return int(np.argmax(noisy))


def gumbel(noise_key: int, position: int, token_id: int) -> float:
    """One draw of the keyed noise, in Python integers."""
    state = _splitmix(_splitmix(noise_key & _MASK) + position * 0xD1342543DE82EF95)
    bits = _splitmix(state + token_id * 0x9E3779B97F4A7C15) >> 12
    return -math.log(-math.log((bits + 0.5) * 2.0**-52))


def _splitmix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.exp(scores - scores.max())
    total: float = weights.sum()
    return weights / total
