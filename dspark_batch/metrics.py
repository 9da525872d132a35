"""Counters of the engine: one frozen record per round, and running totals. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any


class PlanReason(StrEnum):
    """Why a round drafted what it drafted."""

    OFF = "off"
    """The schedule never drafts, or the drafter cannot."""
    FIXED = "fixed"
    """Always the same length."""
    THRESHOLD = "threshold"
    """As far as the drafter's confidence reaches."""
    NO_TABLE = "no_table"
    """Nothing is known about costs, so nothing is trimmed."""
    AT_LIMIT = "at_limit"
    """No row can use more than one token, or the step has no room."""
    PAUSED = "paused"
    """Drafting did not pay lately; it is tried again after a pause."""
    EXPLORE = "explore"
    """Drafted in order to learn whether it pays; only what pays at once is verified."""
    PLAIN_STEP = "plain_step"
    """Drafting pays; one plain step keeps the cost of plain decoding known."""
    NOT_WORTH_IT = "not_worth_it"
    """No length was expected to pay, before the draft or after it."""
    NO_OFFER = "no_offer"
    """The drafter was asked and had nothing."""
    DRAFTED = "drafted"
    """The lengths with the best expected tokens per second."""
    STANDING = "standing"
    """Tokens worth the price that an earlier round of the same batch had found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One engine step: a target forward with what came before and after it.

    num_rows: samples with a verify slice. num_verify_tokens: their flat tokens, anchors included. num_prefill_tokens:
    flat prompt tokens of the same forward. num_planned_draft_tokens: what the schedule asked the drafter for, 0 where
    it chose not to draft; reason: why, None without decoding rows. num_drafted_tokens: proposed by the drafter, whether
    verified or not. num_accepted_tokens: drafted tokens that stand; num_emitted_tokens also counts the one that follows
    them, less what a stop or the length limit dropped. The four times add up to the step: drafting; target forward,
    logits included; sampling, verification and commit; everything else on the host. On a device that works
    asynchronously, the sampling time also holds the wait for the forward. draft_lengths, accepted_lengths: [num_rows]
    verified draft tokens of each row and how many of them the verifier took, 0 where a constraint forced the tokens.
    """

    num_rows: int = 0
    num_prefill_tokens: int = 0
    num_verify_tokens: int = 0
    num_planned_draft_tokens: int = 0
    num_drafted_tokens: int = 0
    num_verified_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    num_finished: int = 0
    num_queued: int = 0
    draft_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    host_s: float = 0.0
    reason: PlanReason | None = None
    draft_lengths: Sequence[int] = ()
    accepted_lengths: Sequence[int] = ()


@dataclass(slots=True)
class EngineStats:
    """Totals over all steps of an engine; times in seconds, counts as in :class:`StepRecord`.

    num_steps_by_reason: how often the schedule decided what. num_rounds_by_draft_length, num_rounds_by_accepted_length:
    rounds of rows in steps that verified drafts.
    """

    num_steps: int = 0
    num_row_rounds: int = 0
    num_prefill_tokens: int = 0
    num_shared_prefix_tokens: int = 0
    num_verify_tokens: int = 0
    num_drafted_tokens: int = 0
    num_verified_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    num_finished: int = 0
    num_failed: int = 0
    draft_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    host_s: float = 0.0
    num_steps_by_reason: dict[PlanReason, int] = field(default_factory=dict)
    num_rounds_by_draft_length: Counter[int] = field(default_factory=Counter)
    num_rounds_by_accepted_length: Counter[int] = field(default_factory=Counter)
    last: StepRecord | None = None

    def add(self, record: StepRecord) -> None:
        self.num_steps += 1
        self.num_row_rounds += record.num_rows
        self.num_prefill_tokens += record.num_prefill_tokens
        self.num_verify_tokens += record.num_verify_tokens
        self.num_drafted_tokens += record.num_drafted_tokens
        self.num_verified_draft_tokens += record.num_verified_draft_tokens
        self.num_accepted_tokens += record.num_accepted_tokens
        self.num_emitted_tokens += record.num_emitted_tokens
        self.num_finished += record.num_finished
        self.draft_s += record.draft_s
        self.forward_s += record.forward_s
        self.sample_s += record.sample_s
        self.host_s += record.host_s
        if record.reason is not None:
            self.num_steps_by_reason[record.reason] = self.num_steps_by_reason.get(record.reason, 0) + 1
        if record.num_verified_draft_tokens:
            self.num_rounds_by_draft_length.update(record.draft_lengths)
            self.num_rounds_by_accepted_length.update(record.accepted_lengths)
        self.last = record

    def __add__(self, other: EngineStats) -> EngineStats:
        """The totals of both, one after the other."""
        sums: dict[str, Any] = {name: value + getattr(other, name) for name, value in self.as_dict().items()}
        by_reason = Counter(self.num_steps_by_reason) + Counter(other.num_steps_by_reason)
        return EngineStats(
            **sums,
            num_steps_by_reason=dict(by_reason),
            num_rounds_by_draft_length=self.num_rounds_by_draft_length + other.num_rounds_by_draft_length,
            num_rounds_by_accepted_length=self.num_rounds_by_accepted_length + other.num_rounds_by_accepted_length,
            last=other.last or self.last,
        )

    @property
    def total_s(self) -> float:
        return self.draft_s + self.forward_s + self.sample_s + self.host_s

    @property
    def accepted_length(self) -> float | None:
        """Mean tokens per row and round, the one after the draft included; None before the first round."""
        if not self.num_row_rounds:
            return None
        return 1.0 + self.num_accepted_tokens / self.num_row_rounds

    def as_dict(self) -> dict[str, int | float]:
        """The totals by name, for a metrics line."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    def by_position(self) -> list[tuple[int, int]]:
        """Of each draft position, from the first: tokens that were verified there, and those that were accepted.

        May be called while another thread adds.
        """
        drafts, accepts = self.num_rounds_by_draft_length.copy(), self.num_rounds_by_accepted_length.copy()
        return [(_at_least(place, drafts), _at_least(place, accepts)) for place in range(1, max(drafts, default=0) + 1)]


def _at_least(length: int, num_rounds: Counter[int]) -> int:
    return sum(count for found, count in num_rounds.items() if found >= length)
