"""Token verification: each drafted token passes or fails by itself (Leviathan et al. 2211.17192, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_batch.verification.rejection import Decision, RejectionNoise, Slots, emit, token_probs
from dspark_batch.verification.rejection_verifier import RejectionVerifier


def token_decision(slots: Slots, target_probs: Tensor, draft_probs: Tensor | None) -> Decision:
    """Thresholds p_k(x_k) / q_k(x_k), [R, K]; the residual is max(p - q, 0)."""
    p, q = token_probs(slots, target_probs, draft_probs)
    thresholds = torch.where(p >= q, 1.0, p / q)
    num_rows, longest = thresholds.shape
    return Decision(thresholds=thresholds, weight=thresholds.new_ones(num_rows, longest + 1))


def verify_token_slots(
    slots: Slots, target_probs: Tensor, draft_probs: Tensor | None, noise: RejectionNoise
) -> tuple[Tensor, Tensor]:
    """Accepted count and next token of each row, [R] int64 each; all inputs and outputs on one device.

    target_probs: [N, V]. draft_probs: [M, V], the rows of the one-hot drafts left out; None if all are one-hot.
    """
    decision = token_decision(slots, target_probs, draft_probs)
    passed = (noise.accept[:, : decision.thresholds.shape[1]] < decision.thresholds) & slots.used
    num_accepted = passed.int().cumprod(1).sum(1)
    return num_accepted, emit(slots, decision, num_accepted, noise.residual, target_probs, draft_probs)


class TokenVerifier(RejectionVerifier):
    """Token verification of one round of ragged rows."""

    name = "token"

    def verify_slots(
        self, slots: Slots, target_probs: Tensor, draft_probs: Tensor | None, noise: RejectionNoise
    ) -> tuple[Tensor, Tensor]:
        return verify_token_slots(slots, target_probs, draft_probs, noise)
