"""Block verification: the draft is judged as a whole (Sun et al. 2403.10444, algorithm 2).

With P_i the capped likelihood ratio of the first i drafts and Z_i the mass of max(P_i p - q, 0), slot i passes with
probability Z_i / (Z_i + 1 - P_i), the last one with P_l, and the longest prefix that ends in a pass is accepted. In
expectation it accepts at least as much as token verification. It is exact for any verify length that is chosen without
looking at the token it trims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_batch.verification.rejection import Decision, RejectionNoise, Slots, emit, token_probs
from dspark_batch.verification.rejection_verifier import RejectionVerifier

_CHUNK_ELEMENTS = 2**22
"""Probabilities handled at a time; bounds the scratch."""


def block_decision(slots: Slots, target_probs: Tensor, draft_probs: Tensor | None) -> Decision:
    """Thresholds h_1 .. h_l, [R, K]; weight[:, i] = P_i."""
    p, q = token_probs(slots, target_probs, draft_probs)
    ratio = _prefix_ratio(p, q)
    before, after = ratio[:, :-1], ratio[:, 1:]
    # mass[:, i] = Z_i, for the slots that follow i accepted drafts.
    mass = before * (1.0 - p)
    if draft_probs is not None:
        _fill_sampled_mass(mass, slots, before, target_probs, draft_probs)
    last = torch.arange(mass.shape[1], device=mass.device) == (slots.num_slots - 1).unsqueeze(1)
    next_mass = torch.cat([mass[:, 1:], mass[:, :1]], 1)
    below = next_mass + (1.0 - after)
    inner = torch.where(below > 0, next_mass / below, 1.0)
    return Decision(thresholds=torch.where(last, after, inner), weight=ratio)


def _prefix_ratio(p: Tensor, q: Tensor) -> Tensor:
    """P_0 .. P_K, [R, K + 1] float64, in log space so that long products of small ratios neither vanish nor drift."""
    log_ratio = p.log() - q.log()
    current = log_ratio.new_zeros(p.shape[0])
    logs = [current]
    for k in range(p.shape[1]):
        current = (current + log_ratio[:, k]).clamp_max(0.0)
        logs.append(current)
    return torch.stack(logs, 1).exp()


def _fill_sampled_mass(mass: Tensor, slots: Slots, before: Tensor, target_probs: Tensor, draft_probs: Tensor) -> None:
    """Overwrite Z_i where the draft has a distribution; one-hot rows have the closed form P_i (1 - p(x)).

    A distribution that is NaN ends the draft before it: Z_i = P_i gives the slot before it the threshold of a last one.
    """
    sampled = slots.used & (slots.draft_row >= 0).unsqueeze(1)
    offsets = torch.arange(mass.shape[1], device=mass.device)
    p_rows = (slots.target_row.unsqueeze(1) + offsets)[sampled]
    ratio = before[sampled].to(target_probs.dtype).unsqueeze(1)
    sums = torch.empty_like(ratio)
    step = max(1, _CHUNK_ELEMENTS // target_probs.shape[1])
    for first in range(0, len(p_rows), step):
        part = slice(first, first + step)
        excess = target_probs[p_rows[part]].mul_(ratio[part]).sub_(draft_probs[part])
        sums[part] = excess.clamp_min_(0.0).sum(1, keepdim=True)
    mass[sampled] = torch.where(sums.isnan(), ratio, sums).squeeze(1).double()


def verify_block_slots(
    slots: Slots, target_probs: Tensor, draft_probs: Tensor | None, noise: RejectionNoise
) -> tuple[Tensor, Tensor]:
    """Accepted count and next token of each row, [R] int64 each; all inputs and outputs on one device.

    target_probs: [N, V]. draft_probs: [M, V], the rows of the one-hot drafts left out; None if all are one-hot.
    """
    decision = block_decision(slots, target_probs, draft_probs)
    longest = decision.thresholds.shape[1]
    passed = (noise.accept[:, :longest] < decision.thresholds) & slots.used
    ends = torch.arange(1, longest + 1, device=passed.device)
    num_accepted = torch.cat([slots.num_slots.new_zeros(passed.shape[0], 1), passed * ends], 1).amax(1)
    return num_accepted, emit(slots, decision, num_accepted, noise.residual, target_probs, draft_probs)


class BlockVerifier(RejectionVerifier):
    """Block verification of one round of ragged rows."""

    name = "block"

    def verify_slots(
        self, slots: Slots, target_probs: Tensor, draft_probs: Tensor | None, noise: RejectionNoise
    ) -> tuple[Tensor, Tensor]:
        return verify_block_slots(slots, target_probs, draft_probs, noise)
