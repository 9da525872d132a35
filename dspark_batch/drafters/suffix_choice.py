"""Which of several known continuations to draft, how far, and how sure: counts, vectorised over queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Choice:
    """token_ids: [Q, K]. num_tokens: [Q] length of each draft. confidence: [Q, K] conditional chance of each token.
    expected: [Q] expected number of accepted tokens of the draft."""

    token_ids: Ints
    num_tokens: Ints
    confidence: Floats
    expected: Floats


def choose(
    continuations: Ints,
    match_lengths: Ints,
    *,
    max_tokens: Ints,
    length_factor: float,
    length_offset: float,
    min_survival: float,
) -> Choice:
    """The continuation with the largest expected number of accepted tokens, and its useful length.

    continuations: [Q, M, K] tokens, -1 after an end, newest first. match_lengths: [Q, M] matched context in tokens, 0
    for no candidate. max_tokens: [Q].

    Of the candidates that agree with continuation i on its first k tokens and go on, s of e also agree on the next one.
    Its conditional confidence is (s + prior) / (e + 1), where the prior (m + k) / (m + k + 1) is one more observation
    that trusts a context of m + k tokens the more the longer it is. A draft ends where the product of its confidences
    falls below ``min_survival`` and after length_factor * m + length_offset tokens. Ties go to the newest candidate.
    """
    num_queries, _, longest = continuations.shape
    goes_on = continuations >= 0
    agree, can_agree = _support(continuations, goes_on)
    context = match_lengths[:, :, None] + np.arange(longest)
    confidence = (agree + context / (context + 1.0)) / (can_agree + 1.0)
    survival = np.cumprod(confidence, axis=2)
    limit = np.floor(length_factor * match_lengths + length_offset).astype(np.int64)
    limit = np.minimum(limit, max_tokens[:, None]) * (match_lengths > 0)
    keep = goes_on & (survival >= min_survival) & (np.arange(longest) < limit[:, :, None])
    score = np.cumsum(survival * keep, axis=2)[:, :, -1]
    best = score.argmax(1)
    query = np.arange(num_queries)
    return Choice(
        token_ids=continuations[query, best],
        num_tokens=keep[query, best].sum(1),
        confidence=confidence[query, best],
        expected=score[query, best],
    )


def _support(continuations: Ints, goes_on: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """[Q, M, K] each: how many candidates agree up to and with this token, and how many could have.

    Where a query's candidates never differ, both are the number that go on; only the others are compared in pairs.
    """
    agree = np.empty(continuations.shape)
    agree[:] = np.sum(goes_on, axis=1, keepdims=True)
    could = agree.copy()
    any_token = continuations.max(axis=1, keepdims=True)
    split = np.flatnonzero(((continuations != any_token) & goes_on).any(axis=(1, 2)))
    if len(split):
        agree[split], could[split] = _pairwise_support(continuations[split], goes_on[split])
    return agree, could


def _pairwise_support(continuations: Ints, goes_on: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """The same for any candidates.

    Prefixes are compared by a 32-bit running hash. The candidate axes come first, so that sums run over long rows.
    """
    powers = np.cumprod(np.full(continuations.shape[2], _GOLDEN, np.uint64))
    prefix = np.cumsum(continuations.transpose(1, 0, 2).astype(np.uint64) * powers, axis=2)
    prefix = (prefix >> np.uint64(32)).astype(np.uint32)
    present = np.ascontiguousarray(goes_on.transpose(1, 0, 2))
    same = prefix[:, None] == prefix[None]
    agree: NDArray[np.int8] = np.sum((same & present[:, None]).view(np.int8), axis=0, dtype=np.int8)
    could = np.empty_like(agree)
    could[..., 0] = np.sum(present[..., 0], axis=0)
    could[..., 1:] = np.sum((same[..., :-1] & present[:, None, :, 1:]).view(np.int8), axis=0, dtype=np.int8)
    return agree.transpose(1, 0, 2).astype(np.float64), could.transpose(1, 0, 2).astype(np.float64)
