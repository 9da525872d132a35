"""Slow float64 oracles of token and block verification, on one row and without any vectorised step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def one_hot_rows(draft: Sequence[int], vocab_size: int) -> Tensor:
    """[len(draft), V]: the draft distributions of a drafter that proposes without sampling."""
    rows = torch.zeros(len(draft), vocab_size, dtype=torch.float64)
    for k, token in enumerate(draft):
        rows[k, token] = 1.0
    return rows


def token_row(p: Tensor, q: Tensor, draft: Sequence[int], accept: Tensor, residual: float) -> tuple[int, int]:
    """Accepted length and next token under token verification (2211.17192, algorithm 1).

    p: [len(draft) + 1, V] target. q: [len(draft), V] draft. accept: [len(draft)] and residual: uniform numbers.
    """
    for k, token in enumerate(draft):
        if accept[k] >= min(1.0, float(p[k, token]) / float(q[k, token])):
            return k, draw(_or_target((p[k] - q[k]).clamp_min(0.0), p[k]), residual)
    return len(draft), draw(p[-1], residual)


def block_row(p: Tensor, q: Tensor, draft: Sequence[int], accept: Tensor, residual: float) -> tuple[int, int]:
    """Accepted length and next token under block verification (2403.10444, algorithm 2); arguments as in token_row."""
    ratios, thresholds = block_thresholds(p, q, draft)
    num_accepted = 0
    for i in range(1, len(draft) + 1):
        if accept[i - 1] < thresholds[i - 1]:
            num_accepted = i
    if num_accepted == len(draft):
        return num_accepted, draw(p[-1], residual)
    left = (ratios[num_accepted] * p[num_accepted] - q[num_accepted]).clamp_min(0.0)
    return num_accepted, draw(_or_target(left, p[num_accepted]), residual)


def block_thresholds(p: Tensor, q: Tensor, draft: Sequence[int]) -> tuple[list[float], list[float]]:
    """P_0 .. P_l and h_1 .. h_l of block verification."""
    ratios = [1.0]
    for k, token in enumerate(draft):
        ratios.append(min(1.0, ratios[-1] * float(p[k, token]) / float(q[k, token])))
    thresholds = []
    for i in range(1, len(draft)):
        mass = float((ratios[i] * p[i] - q[i]).clamp_min(0.0).sum())
        below = mass + 1.0 - ratios[i]
        thresholds.append(mass / below if below > 0 else 1.0)
    return ratios, [*thresholds, ratios[-1]] if draft else []


def draw(weights: Tensor, uniform: float) -> int:
    """The first index at which the running sum of ``weights`` exceeds ``uniform`` times the whole."""
    total = float(weights.sum())
    running = 0.0
    for index, weight in enumerate(weights.tolist()):
        running += weight
        if running > uniform * total:
            return index
    return int(weights.nonzero()[-1])


def _or_target(left: Tensor, target: Tensor) -> Tensor:
    return left if left.max() > 0 else target
