"""Rounds of an imaginary engine around a policy: made-up step times, drafts that hold by chance, known text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark_batch.metrics import PlanReason
from dspark_batch.scheduling.cost import StepCost
from dspark_batch.scheduling.policies import LengthPolicy, RoundLoad, RoundOutcome
from dspark_batch.scheduling.profiler import Grid, measure_costs
from dspark_batch.tensors import DraftBlock

WRONG = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftKind:
    """How a drafter does on a row. chance: that one token holds. offers: that it has a draft at all. says: the
    confidence that it gives, or None. longest: tokens of a draft at most."""

    chance: float
    offers: float = 1.0
    says: float | None = None
    longest: int = 64


@dataclass
class ScheduleWorld:
    """step_s: (flat tokens, rows) -> seconds. draft_s: (rows that draft, longest draft) -> seconds. kind: of each
    handle. shows_tokens: the policy is told what was emitted. noise: of step times, relative.

    A row's text is its positions, so that a draft is right or ``WRONG`` whenever somebody looks.
    """

    policy: LengthPolicy
    step_s: Callable[[int, int], float]
    kind: Callable[[int], DraftKind]
    draft_s: Callable[[int, int], float] = lambda rows, longest: 0.0005
    num_rows: int = 8
    shows_tokens: bool = True
    noise: float = 0.05
    context_tokens: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    num_emitted: int = 0
    seconds: float = 0.0
    asked: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    reasons: Counter[PlanReason] = field(default_factory=Counter)
    _at: dict[int, int] = field(default_factory=dict)

    def run(self, num_rounds: int, *, first_handle: int = 0, num_queued: int = 0) -> float:
        """Plays rounds; gives emitted tokens per second over them."""
        emitted, seconds = self.num_emitted, self.seconds
        for _ in range(num_rounds):
            self.play(range(first_handle, first_handle + self.num_rows), num_queued=num_queued)
        return (self.num_emitted - emitted) / (self.seconds - seconds)

    def plain_rate(self) -> float:
        return self.num_rows / self.step_s(self.num_rows, self.num_rows)

    def play(
        self,
        handles: Sequence[int],
        *,
        num_queued: int = 0,
        limits: Sequence[int] | None = None,
        num_prefill_tokens: int = 0,
    ) -> list[int]:
        """One round, with so many prompt tokens in its step; the number of tokens that each row emitted."""
        rows = list(handles)
        limits = [30] * len(rows) if limits is None else limits
        load = RoundLoad(
            handles=rows,
            limits=limits,
            num_prefill_tokens=num_prefill_tokens,
            num_queued=num_queued,
            context_tokens=self.context_tokens,
            num_left=[limit + 1 for limit in limits],
        )
        lengths = list(self.policy.draft_lengths(load))
        assert all(0 <= length <= limit for length, limit in zip(lengths, load.limits, strict=True))
        drafts: list[list[int]] = [[] for _ in rows]
        verify, draft_s = [0] * len(rows), 0.0
        if any(lengths):
            draft_s = self.draft_s(sum(map(bool, lengths)), max(lengths))
            drafts = [self._draft(handle, length) for handle, length in zip(rows, lengths, strict=True)]
            verify = list(self.policy.verify_plan(load, self._block(rows, drafts)).verify_len)
            assert all(0 <= v <= len(d) for v, d in zip(verify, drafts, strict=True))
        accepted = [_num_right(draft[:v]) for draft, v in zip(drafts, verify, strict=True)]
        emitted = [self._advance(handle, held + 1) for handle, held in zip(rows, accepted, strict=True)]
        num_tokens = len(rows) + sum(verify) + num_prefill_tokens
        true_s = self.step_s(num_tokens, len(rows))
        told_s = true_s * self.rng.uniform(1 - self.noise, 1 + self.noise)
        shown = emitted if self.shows_tokens else None
        outcome = RoundOutcome(verify, accepted, num_tokens, num_prefill_tokens, draft_s, told_s, shown)
        self.policy.observe(load, outcome)
        self.num_emitted += sum(map(len, emitted))
        self.seconds += draft_s + true_s
        self.asked.append(sum(lengths))
        self.verified.append(sum(verify))
        self.reasons[self.policy.reason] += 1
        return [len(tokens) for tokens in emitted]

    def _draft(self, handle: int, length: int) -> list[int]:
        kind = self.kind(handle)
        if not length or self.rng.random() >= kind.offers:
            return []
        at, draft, is_right = self._at.get(handle, 0), [], True
        for k in range(min(length, kind.longest)):
            is_right = is_right and self.rng.random() < kind.chance
            draft.append(at + 1 + k if is_right else WRONG)
        return draft

    def _block(self, handles: Sequence[int], drafts: Sequence[Sequence[int]]) -> DraftBlock:
        said = [self.kind(handle).says for handle in handles]
        confidence = None
        if all(value is not None for value in said):
            confidence = [[value or 0.0] * len(d) for value, d in zip(said, drafts, strict=True)]
        return DraftBlock(token_ids=drafts, confidence=confidence)

    def _advance(self, handle: int, count: int) -> list[int]:
        at = self._at.get(handle, 0)
        self._at[handle] = at + count
        return list(range(at + 1, at + 1 + count))


def known_cost(step_s: Callable[[int, int], float], *, most_rows: int = 64, longest_draft: int = 8) -> StepCost:
    """What the profiler finds on a device of these step times, undisturbed."""
    grid = Grid.for_engine(most_rows=most_rows, longest_draft=longest_draft, max_context=256)
    table = measure_costs(grid, time_step=lambda context, rows, tokens: step_s(tokens, rows), clock=lambda: 0.0)
    assert table is not None, "an imaginary device holds every size"
    return StepCost(table)


def _num_right(draft: Sequence[int]) -> int:
    return next((k for k, token in enumerate(draft) if token == WRONG), len(draft))
