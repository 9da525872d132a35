"""From logits to the distribution that is sampled: penalty, temperature, top-k, top-p, min-p, in this order.

The meaning of each step is that of transformers' logits processors, with one rule more: tokens with equal logits are
kept or dropped together, so the surviving set does not depend on a sort's order of ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_batch.core import SamplingParams

FIRST_WIDTH = 256
"""Candidates looked at first where top-p or min-p limits the support; rows that need more look again, wider."""


@dataclass(frozen=True, slots=True)
class LimitedSupport:
    """Tokens that survive top-k, top-p and min-p, for M positions.

    token_ids: [M, K] int64, best first. scores: [M, K] float64, logit / temperature, -inf where a candidate is cut.
    """

    token_ids: Tensor
    scores: Tensor


def limits_support(sampling: SamplingParams) -> bool:
    """Whether some tokens may be cut, so that the draw is not over the whole vocabulary."""
    return sampling.top_k is not None or sampling.top_p < 1.0 or bool(sampling.min_p)


def penalise_(
    logits: Tensor, positions: Sequence[int], seen: Sequence[NDArray[np.int64]], penalties: Sequence[float]
) -> None:
    """Repetition penalty in place: a seen token's logit is divided by the penalty if positive, else multiplied.

    logits: [N, V]. Per entry i: seen[i] holds token ids (doubles allowed) for flat position positions[i].
    """
    lengths = torch.tensor([len(ids) for ids in seen])
    rows = torch.tensor(positions).repeat_interleave(lengths).to(logits.device)
    tokens = torch.from_numpy(np.concatenate(seen)).to(logits.device)
    factor = torch.tensor(penalties, dtype=logits.dtype).repeat_interleave(lengths).to(logits.device)
    old = logits[rows, tokens]
    logits[rows, tokens] = torch.where(old < 0, old * factor, old / factor)


def limited_support(logits: Tensor, sampling: Sequence[SamplingParams]) -> LimitedSupport:
    """The support of M positions that each have a limit (see :func:`limits_support`) and a temperature above 0.

    logits: [M, V] float32, after penalties, with finite maxima.
    """
    vocab_size = logits.shape[1]
    width = min(vocab_size, max(FIRST_WIDTH, 2 * max(s.top_k or 0 for s in sampling)))
    limits = _Limits.of(sampling, vocab_size, logits.device)
    total = _total_mass(logits, limits)
    found, complete = _look(logits, limits, total, width)
    if complete.all():
        return found
    again = (~complete).nonzero().squeeze(-1)
    wider = min(vocab_size, width * 8)
    while True:
        extra, complete = _look(logits[again], limits.take(again), total[again], wider)
        if wider == vocab_size or bool(complete.all()):
            return _merge(found, extra, again)
        wider = min(vocab_size, wider * 8)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Per position, [M, 1]: temperature, top_k (V without), top_p, log of min_p (-inf without)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    any_top_p: bool

    @classmethod
    def of(cls, sampling: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> _Limits:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).to(device).unsqueeze(-1)

        return cls(
            temperature=column([s.temperature for s in sampling]),
            top_k=column([min(s.top_k or vocab_size, vocab_size) for s in sampling]).long(),
            top_p=column([s.top_p if s.top_p < 1.0 else torch.inf for s in sampling]),
            log_min_p=column([s.min_p or 0.0 for s in sampling]).log(),
            any_top_p=any(s.top_p < 1.0 for s in sampling),
        )

    def take(self, rows: Tensor) -> _Limits:
        return _Limits(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.log_min_p[rows], self.any_top_p)


def _total_mass(logits: Tensor, limits: _Limits) -> Tensor:
    """[M, 1] float64, sum over the vocabulary of exp(score - best score); used by rows without top-k only."""
    if not limits.any_top_p:
        return torch.ones(logits.shape[0], 1, dtype=torch.float64, device=logits.device)
    shifted = (logits - logits.amax(-1, keepdim=True)) / limits.temperature.float()
    return shifted.exp_().sum(-1, keepdim=True, dtype=torch.float64)


def _look(logits: Tensor, limits: _Limits, total: Tensor, width: int) -> tuple[LimitedSupport, Tensor]:
    """The support among the best ``width`` tokens, and per position whether no survivor can lie beyond them."""
    vocab_size = logits.shape[1]
    values, token_ids = logits.topk(width, dim=-1)
    scores = values.double() / limits.temperature
    in_reach = limits.top_k <= width
    kth = values.gather(1, (limits.top_k - 1).clamp_(max=width - 1))
    keep = (values >= kth) | ~in_reach
    past_top_k = in_reach & (values[:, -1:] < kth)

    mass = (scores - scores[:, :1]).exp_().mul_(keep)
    limited = limits.top_k < vocab_size
    norm = torch.where(limited, mass.sum(-1, keepdim=True), total)
    before = mass.cumsum(-1) - mass
    before = before.gather(1, _first_of_ties(values))
    in_nucleus = before < limits.top_p * norm
    above_floor = scores - scores[:, :1] >= limits.log_min_p
    # A row without top-k is complete once the last candidate itself is cut by top-p or min-p.
    last_cut = ~(in_nucleus & above_floor)[:, -1:]
    complete = past_top_k | (last_cut & ~limited) | ~above_floor[:, -1:]
    complete |= torch.full_like(complete, width == vocab_size)
    keep &= in_nucleus & above_floor
    keep[:, 0] = True
    scores = scores.masked_fill_(~keep, -torch.inf)
    return LimitedSupport(token_ids=token_ids, scores=scores), complete.squeeze(-1)


def _first_of_ties(values: Tensor) -> Tensor:
    """[M, K] -> index of the first of the equal values that each position belongs to; values descend."""
    index = torch.arange(values.shape[1], device=values.device).expand_as(values)
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    return torch.where(starts, index, 0).cummax(-1).values


def _merge(narrow: LimitedSupport, wide: LimitedSupport, rows: Tensor) -> LimitedSupport:
    """``narrow`` with the given rows replaced by those of ``wide``."""
    missing = wide.token_ids.shape[1] - narrow.token_ids.shape[1]
    token_ids = torch.nn.functional.pad(narrow.token_ids, (0, missing))
    scores = torch.nn.functional.pad(narrow.scores, (0, missing), value=-torch.inf)
    token_ids[rows] = wide.token_ids
    scores[rows] = wide.scores
    return LimitedSupport(token_ids=token_ids, scores=scores)
