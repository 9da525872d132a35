"""The top-2 margin of a draft: how far the best score leads, which says how likely the target agrees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_batch.core import SamplingParams
from dspark_batch.sampling import noise

MAX_MARGIN = 100.0
"""Larger leads are cut to this: nothing further is to be learned from them."""

_NUM_CANDIDATES = 32


def top2_margin(scores: Tensor) -> Tensor:
    """[N, C] -> [N] float32, the lead of the best score over the next; ``MAX_MARGIN`` where there is no other."""
    return best_and_margin(scores)[1]


def best_and_margin(scores: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C] -> [N] int64 column of the best score, and its :func:`top2_margin`."""
    if scores.shape[1] < 2:
        return scores.argmax(-1), torch.full(scores.shape[:1], MAX_MARGIN, device=scores.device)
    best = scores.topk(2, dim=-1)
    margin = (best.values[:, 0] - best.values[:, 1]).clamp(max=MAX_MARGIN).nan_to_num(0.0).float()
    return best.indices[:, 0], margin


def shared_noise_margin(
    logits: Tensor, sampling: Sequence[SamplingParams], *, keys: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """[N] float32, the lead of the score that coupled verification maximises: logits / temperature + noise.

    logits: [N, V] float32, after penalties. sampling, keys, positions: of each, N long. Greedy ones have no noise. Only
    the best logits are looked at, and top-k, top-p and min-p are left out; it is a signal, not a decision.
    """
    out = top2_margin(logits)
    sampled = [i for i, s in enumerate(sampling) if not s.is_greedy]
    if sampled:
        index = torch.tensor(sampled).to(logits.device)
        best = logits[index].topk(min(_NUM_CANDIDATES, logits.shape[1]), dim=-1)
        temperature = torch.tensor([sampling[i].temperature for i in sampled], dtype=torch.float64)
        at = torch.tensor([(keys[i], positions[i]) for i in sampled], dtype=torch.int64).to(logits.device)
        noisy = best.values.double() / temperature.to(logits.device).unsqueeze(-1)
        out[index] = top2_margin(noisy + noise.gumbel(at[:, 0], at[:, 1], best.indices))
    return out
