"""Draft and verify lengths without a cost model: off and fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark_batch.tensors import DraftBlock, VerifyPlan


@dataclass(frozen=True, slots=True)
class RoundLoad:
    """What is known before a round. limits[r]: tokens that row r could still use beyond the next one; never exceeded.

    handles[r]: the row's ``DraftRow.handle``. num_prefill_tokens: prompt tokens that admitted rows still have to
    compute. num_queued: samples that wait for a place.
    """

    handles: Sequence[int]
    limits: Sequence[int]
    num_prefill_tokens: int
    num_queued: int


class LengthPolicy(Protocol):
    """Chooses how many tokens to draft for each row, then how many of them to verify."""

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        """Per row at most ``load.limits[r]``; 0 drafts nothing."""
        ...

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan: ...


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always ``num_tokens`` (γ), and everything that was drafted is verified. ``num_tokens=0`` is plain decoding."""

    num_tokens: int

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        return [min(limit, self.num_tokens) for limit in load.limits]

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        return VerifyPlan(verify_len=[len(tokens) for tokens in draft.token_ids])
