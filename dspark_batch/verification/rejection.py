"""What token and block verification share: the ragged slots of a round, and the draw from the residual.

Both rules accept a prefix of the draft by comparing uniform numbers with thresholds, then draw one token from
max(w * p - q, 0), where w is 1 (token) or the capped likelihood ratio of the prefix (block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slots:
    """The drafted tokens to verify, padded over rows; K is the longest verify length of the batch.

    num_slots: [R] int64. token_ids: [R, K] int64 (0 in padding). target_row: [R] int64, the flat index of each row's
    first target distribution. draft_row: [R] int64, likewise for its draft distributions, -1 where the draft is
    one-hot.
    """

    num_slots: Tensor
    token_ids: Tensor
    target_row: Tensor
    draft_row: Tensor

    @property
    def used(self) -> Tensor:
        """[R, K] bool: false in padding."""
        return torch.arange(self.token_ids.shape[1], device=self.num_slots.device) < self.num_slots.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Decision:
    """thresholds: [R, K] float64, slot k passes if its uniform number is below. weight: [R, K + 1] float64, the factor
    of p in the residual after k accepted tokens."""

    thresholds: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class RejectionNoise:
    """accept: [R, K] float64 in (0, 1), at least as wide as the longest verify length. residual: [R] float64 in (0, 1).

    Both from streams of their own, keyed by (row, round, slot) and independent of the draws that made the draft.
    """

    accept: Tensor
    residual: Tensor


def make_slots(token_ids: Sequence[Sequence[int]], one_hot: Sequence[bool], device: torch.device) -> Slots:
    """Lay ragged rows out. token_ids: per row the tokens to verify. one_hot: per row whether the draft has no q."""
    lengths = [len(ids) for ids in token_ids]
    longest = max(lengths, default=0)
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in token_ids]
    num_slots = torch.tensor(lengths, dtype=torch.int64, device=device)
    sampled = torch.tensor([not flag for flag in one_hot], dtype=torch.bool, device=device)
    in_draft = num_slots * sampled
    return Slots(
        num_slots=num_slots,
        token_ids=torch.tensor(padded, dtype=torch.int64, device=device).view(len(lengths), longest),
        target_row=(num_slots + 1).cumsum(0) - (num_slots + 1),
        draft_row=torch.where(sampled, in_draft.cumsum(0) - in_draft, -1),
    )


def token_probs(slots: Slots, target_probs: Tensor, draft_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """p_k(x_k) and q_k(x_k), both [R, K] float64; q is 1 in one-hot rows, both are 1 in padding.

    Where a distribution is NaN or could not have given the token, they are such that the token is rejected.
    """
    offsets = torch.arange(slots.token_ids.shape[1], device=slots.num_slots.device)
    used = slots.used
    p = torch.ones(used.shape, dtype=torch.float64, device=used.device)
    q = p.clone()
    rows = (slots.target_row.unsqueeze(1) + offsets)[used]
    p[used] = target_probs[rows, slots.token_ids[used]].double().nan_to_num_(0.0)
    if draft_probs is not None:
        sampled = used & (slots.draft_row >= 0).unsqueeze(1)
        rows = (slots.draft_row.unsqueeze(1) + offsets)[sampled]
        found = draft_probs[rows, slots.token_ids[sampled]].double()
        q[sampled] = torch.where(found > 0, found, torch.inf)
    return p, q


def residual_weights(
    slots: Slots, num_accepted: Tensor, weight: Tensor, target_probs: Tensor, draft_probs: Tensor | None
) -> Tensor:
    """The unnormalised law of the token after ``num_accepted`` [R] drafts, [R, V] in the dtype of ``target_probs``.

    weight: [R] factor of p. After a row's last slot it is p itself. Where the residual of a sampled draft vanished in
    rounding or is NaN it is p too; that of a one-hot draft vanishes only where the draft cannot be rejected.
    """
    at = slots.target_row + num_accepted
    out = target_probs[at]
    rejected = num_accepted < slots.num_slots
    one_hot = (rejected & (slots.draft_row < 0)).nonzero().squeeze(1)
    out[one_hot, slots.token_ids[one_hot, num_accepted[one_hot]]] = 0.0
    if draft_probs is not None:
        sampled = (rejected & (slots.draft_row >= 0)).nonzero().squeeze(1)
        left = out[sampled].mul_(weight[sampled].to(out.dtype).unsqueeze(1))
        left.sub_(draft_probs[slots.draft_row[sampled] + num_accepted[sampled]]).clamp_min_(0.0)
        vanished = (~(left.amax(1) > 0)).nonzero().squeeze(1)
        left[vanished] = target_probs[at[sampled[vanished]]]
        out[sampled] = left
    return out


def sample_inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index drawn with probability proportional to ``weights``, [M] int64.

    weights: [M, V], not negative, each row with a positive sum. uniforms: [M] float64 in (0, 1). Sums are float64, and
    an index of weight 0 is never drawn.
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    # A goal below the total keeps rounding from running past the last token that has weight.
    goal = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, goal.unsqueeze(-1), right=True).squeeze(-1)


def emit(
    slots: Slots,
    decision: Decision,
    num_accepted: Tensor,
    residual: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
) -> Tensor:
    """The token after the accepted ones, [R] int64. residual: [R] uniform numbers."""
    weight = decision.weight.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
    return sample_inverse_cdf(residual_weights(slots, num_accepted, weight, target_probs, draft_probs), residual)
