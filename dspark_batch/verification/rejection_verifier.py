"""The `Verifier` around token and block verification: gathers ragged rows, keyed noise and chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark_batch.tensors import Verdict
from dspark_batch.verification.base import TargetDraws, VerifyRow
from dspark_batch.verification.coupled import CoupledVerifier
from dspark_batch.verification.rejection import RejectionNoise, Slots, make_slots

MAX_CHUNK_ELEMENTS = 2**26
"""Rows are verified in chunks of at most this many target probabilities (or of one row), which bounds the scratch."""

Uniforms = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(noise keys [R] int64, rounds [R] int64, K) -> accept [R, K] and residual [R], float64 strictly between 0 and 1, from
two independent streams keyed by (row, round, slot): ``sampling.streams.rejection_uniforms``."""


class RejectionVerifier(ABC):
    """Base of the rules that compare uniform numbers with ratios of target to draft probability."""

    name: str
    needs_draft_probs = True

    def __init__(self, uniforms: Uniforms) -> None:
        self._uniforms = uniforms

    @abstractmethod
    def verify_slots(
        self, slots: Slots, target_probs: Tensor, draft_probs: Tensor | None, noise: RejectionNoise
    ) -> tuple[Tensor, Tensor]:
        """Accepted count and next token of each row, [R] int64 each; all inputs and outputs on one device.

        target_probs: [N, V]. draft_probs: [M, V], the rows of the one-hot drafts left out; None if all are one-hot.
        """

    def verify(self, rows: Sequence[VerifyRow], target: TargetDraws) -> Verdict:
        """Greedy rounds need no distributions, so they take the coupled path, which gives the same tokens."""
        if all(row.sampling.is_greedy for row in rows):
            return CoupledVerifier().verify(rows, target)
        probs = target.probs()
        accepted: list[int] = []
        emitted: list[int] = []
        first = 0
        for part in _chunks(rows, probs.shape[1]):
            size = sum(len(row.draft) + 1 for row in part)
            num_accepted, next_token = self._verify_chunk(part, probs[first : first + size])
            accepted += num_accepted.tolist()
            emitted += next_token.tolist()
            first += size
        assert first == probs.shape[0], f"{probs.shape[0]} target distributions for {first} positions"
        return Verdict(num_accepted=accepted, next_token=emitted)

    def _verify_chunk(self, rows: Sequence[VerifyRow], probs: Tensor) -> tuple[Tensor, Tensor]:
        device = probs.device
        slots = make_slots([row.draft for row in rows], [row.draft_probs is None for row in rows], device)
        dense = [row.draft_probs.to(device) for row in rows if row.draft_probs is not None]
        keys = torch.tensor([row.noise_key for row in rows], dtype=torch.int64, device=device)
        rounds = torch.tensor([row.round_index for row in rows], dtype=torch.int64, device=device)
        accept, residual = self._uniforms(keys, rounds, slots.token_ids.shape[1])
        noise = RejectionNoise(accept=accept, residual=residual)
        return self.verify_slots(slots, probs, torch.cat(dense) if dense else None, noise)


def _chunks(rows: Sequence[VerifyRow], vocab_size: int) -> list[Sequence[VerifyRow]]:
    chunks: list[Sequence[VerifyRow]] = []
    start = used = 0
    for index, row in enumerate(rows):
        size = (len(row.draft) + 1) * vocab_size
        if used and used + size > MAX_CHUNK_ELEMENTS:
            chunks.append(rows[start:index])
            start, used = index, 0
        used += size
    if rows:
        chunks.append(rows[start:])
    return chunks
