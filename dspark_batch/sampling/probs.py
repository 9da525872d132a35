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
"""Least number of candidates looked at first where top-p or min-p limits the support."""

_BLOCK = 32


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
    if bool(complete.all()):
        return found
    again = (~complete).nonzero().squeeze(-1)
    extra, _ = _look(logits[again], limits.take(again), total[again], vocab_size)
    return _merge(found, extra, again)


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
    """[M, 1] float64, sum over the vocabulary of exp(score - best score); 1 where no row has a top-p.

    On the CPU row by row: the terms stay in the cache, and a row's sum does not depend on the rows beside it.
    """
    total = torch.ones(logits.shape[0], 1, dtype=torch.float64, device=logits.device)
    if not limits.any_top_p:
        return total
    temperature = limits.temperature.float()
    if logits.device.type != "cpu":
        shifted = (logits - logits.amax(-1, keepdim=True)) / temperature
        return shifted.exp_().sum(-1, keepdim=True, dtype=torch.float64)
    for row, out, scale in zip(logits, total, temperature, strict=True):
        out.copy_((row - row.amax()).div_(scale).exp_().sum(dtype=torch.float64))
    return total


def _look(logits: Tensor, limits: _Limits, total: Tensor, width: int) -> tuple[LimitedSupport, Tensor]:
    """The support among the best tokens, at least ``width`` of them, and per position whether none is missing."""
    vocab_size = logits.shape[1]
    values, token_ids = _best_tokens(logits, width)
    scores = values.double() / limits.temperature
    # Every token that ties with the last candidate is a candidate too, so the k-th value settles top-k.
    keep = values >= values.gather(1, limits.top_k.clamp(max=values.shape[1]) - 1)
    keep &= values > -torch.inf
    relative = scores - scores[:, :1]
    mass = relative.exp().mul_(keep)
    candidates = mass.sum(-1, keepdim=True)
    has_top_k = limits.top_k < vocab_size
    norm = torch.where(has_top_k, candidates, total)
    before = (mass.cumsum(-1) - mass).gather(1, _first_of_ties(values))
    above_floor = relative >= limits.log_min_p
    # Tokens beyond the candidates come after all of their mass, and below the least of them.
    below_floor = (~above_floor & (values > -torch.inf)).any(-1, keepdim=True)
    complete = has_top_k | (candidates >= limits.top_p * norm) | below_floor
    complete |= torch.full_like(complete, width >= vocab_size)
    keep &= (before < limits.top_p * norm) & above_floor
    keep[:, 0] = True
    return LimitedSupport(token_ids=token_ids, scores=scores.masked_fill_(~keep, -torch.inf)), complete.squeeze(-1)


def _best_tokens(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Values and ids [M, K], best first, of all tokens at or above some floor, at least ``width`` a position.

    K is the longest; shorter positions are filled with -inf and token 0. The floor is the ``width``-th largest of
    the maxima of blocks of tokens: as many tokens reach it, so it needs no search through the whole vocabulary.
    """
    vocab_size = logits.shape[1]
    num_blocks = vocab_size // _BLOCK
    if width >= num_blocks:
        top = logits.sort(dim=-1, descending=True, stable=True)
        return top.values, top.indices
    maxima = logits[:, : num_blocks * _BLOCK].reshape(-1, num_blocks, _BLOCK).amax(-1)
    floor = maxima.topk(width, dim=-1).values[:, -1:]
    row, token = (logits >= floor).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=logits.shape[0])
    longest = max(int(counts.max()), width)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = logits.new_full((logits.shape[0], longest), -torch.inf)
    token_ids = torch.zeros(values.shape, dtype=torch.int64, device=logits.device)
    values[row, column] = logits[row, token]
    token_ids[row, column] = token
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


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
