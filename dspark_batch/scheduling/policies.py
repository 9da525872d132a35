"""Draft and verify lengths: the interface, and the rules without a cost model (off, fixed, confidence threshold)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark_batch.metrics import PlanReason
from dspark_batch.tensors import DraftBlock, VerifyPlan


@dataclass(frozen=True, slots=True)
class RoundLoad:
    """What is known before a round. limits[r]: tokens that row r could still use beyond the next one; never exceeded.

    handles[r]: the row's ``DraftRow.handle``. num_prefill_tokens: prompt tokens that admitted rows still have to
    compute, as far as a step has room for them. num_queued: samples that wait for a place. context_tokens: mean KV
    length of the rows. num_left[r]: tokens that the row may still emit; () where nobody knows. ``limits`` may be less.
    """

    handles: Sequence[int]
    limits: Sequence[int]
    num_prefill_tokens: int
    num_queued: int
    context_tokens: float = 0.0
    num_left: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a round did. num_verified[r], num_accepted[r]: drafted tokens of row r in the forward, and those that held.

    num_step_tokens: flat tokens of the forward, prompt tokens (``num_prefill_tokens`` of them) included. draft_s: time
    in the drafter. step_s: the rest of the step. emitted[r]: what the row emitted; None where nobody knows (a
    simulation).
    """

    num_verified: Sequence[int]
    num_accepted: Sequence[int]
    num_step_tokens: int
    num_prefill_tokens: int
    draft_s: float
    step_s: float
    emitted: Sequence[Sequence[int]] | None = None

    @property
    def is_mostly_prompt(self) -> bool:
        """Whether the time of the step says little about decoding."""
        return 2 * self.num_prefill_tokens > self.num_step_tokens


class LengthPolicy(Protocol):
    """Chooses how many tokens to draft for each row, then how many of them to verify."""

    @property
    def reason(self) -> PlanReason:
        """Why the latest round drafted and verifies what it does."""
        ...

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        """Per row at most ``load.limits[r]``; 0 drafts nothing."""
        ...

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        """Called only after ``draft_lengths`` asked for something. Lengths are at most those of the draft."""
        ...

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """Called after every round with decoding rows, drafted or not."""
        ...


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always ``num_tokens`` (γ), and everything that was drafted is verified. ``num_tokens=0`` is plain decoding."""

    num_tokens: int

    @property
    def reason(self) -> PlanReason:
        return PlanReason.FIXED if self.num_tokens else PlanReason.OFF

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        return [min(limit, self.num_tokens) for limit in load.limits]

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        return VerifyPlan(verify_len=[len(tokens) for tokens in draft.token_ids])

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True)
class ThresholdLength:
    """Drafts ``num_tokens``, and verifies while the draft's survival (product of confidences) is at least ``survival``.

    A baseline without a cost model. Where the drafter says nothing about its confidence, everything is verified. The
    first token below the threshold is cut with all after it: a rule that sees earlier tokens only (``DraftBlock``), so
    it is legal in every verification mode.
    """

    num_tokens: int
    survival: float = 0.5

    @property
    def reason(self) -> PlanReason:
        return PlanReason.THRESHOLD

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        return [min(limit, self.num_tokens) for limit in load.limits]

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        if draft.confidence is None:
            return VerifyPlan(verify_len=[len(tokens) for tokens in draft.token_ids])
        return VerifyPlan(verify_len=[self._prefix(confidence) for confidence in draft.confidence])

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        """Nothing to learn."""

    def _prefix(self, confidence: Sequence[float]) -> int:
        survival = 1.0
        for length, chance in enumerate(confidence):
            survival *= chance
            if survival < self.survival:
                return length
        return len(confidence)


def is_one_hot(draft: DraftBlock) -> bool:
    """Whether every token of the draft is a function of the past, so that its length may depend on it."""
    return draft.probs is None or all(probs is None for probs in draft.probs)
