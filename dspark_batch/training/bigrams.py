"""A first sequential head from the responses' own bigrams, factorised to the head's rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_batch.training.sequences import TokenRow

_PRIOR_COUNT = 20.0
"""Occurrences of a token that weigh as much as the unigram frequencies do."""

_LARGE_SHARE = 0.99
_POWER_STEPS = 2
_SPARE_RANK = 8


def bigram_scores(rows: Sequence[TokenRow], *, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [X] seen before another, how often [X], scores [X, Vd]).

    scores[x, y] = log((c(x, y) + a p(y)) / (a p(y))): with prior weight a, log p(y | x) - log p(y) up to a constant of
    the row, which no softmax sees. columns: [V] draft column of each token, -1 without one.
    """
    pairs = [np.stack((r.token_ids[r.prompt_len - 1 : -1], r.token_ids[r.prompt_len :])) for r in rows if r.prompt_len]
    previous, following = torch.from_numpy(np.concatenate(pairs, axis=1)).long()
    column = columns[following]
    previous, column = previous[column >= 0], column[column >= 0]
    seen, index = previous.unique(return_inverse=True)
    num_columns = int((columns >= 0).sum())
    counts = torch.zeros(len(seen) * num_columns)
    counts.index_add_(0, index * num_columns + column, torch.ones(len(column)))
    counts = counts.view(len(seen), num_columns)
    share = counts.sum(0) + 1.0
    scores = torch.log1p(counts / (_PRIOR_COUNT * share / share.sum()))
    return seen, counts.sum(1), scores


def bigram_factors(
    rows: Sequence[TokenRow], *, columns: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [X], w1 [X, r], w2 [Vd, r]): w1 @ w2.T is close to the scores, tokens weighing by their frequency.

    Nearly all of w1 lies within -1 .. 1. A rank above what the scores have leaves zeros. generator: not advanced; the
    result is a function of its state.
    """
    seen, counts, scores = bigram_scores(rows, columns=columns)
    weight = counts.sqrt()[:, None]
    wanted = min(rank + _SPARE_RANK, *scores.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        u, s, v = torch.svd_lowrank(scores * weight, q=wanted, niter=_POWER_STEPS)
    found = min(rank, wanted)
    w1, w2 = torch.zeros(len(seen), rank), torch.zeros(scores.shape[1], rank)
    w1[:, :found], w2[:, :found] = u[:, :found] * s[:found] / weight, v[:, :found]
    size = w1.abs().quantile(_LARGE_SHARE, dim=0).clamp_min(1e-6)
    return seen, w1 / size, w2 * size
