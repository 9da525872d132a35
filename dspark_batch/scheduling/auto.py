"""``schedule: auto``: draft where it pays, as long as it pays, judged by measured cost and observed acceptance.

Per round: a gate decides whether to draft at all (by what drafting saved lately at this number of rows), the acceptance
history how long, and after the draft its confidences which tokens to verify. The objective is emitted tokens per
second, drafting included. Choices depend on step times; so in coupled mode outputs do not depend on them, and in the
rejection modes sampled drafts are cut by earlier rounds' knowledge only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import DraftCost, StepCost
from dspark_batch.scheduling.estimator import AcceptanceHistory, ConfidenceScale
from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.planner import Admitted, admit
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome, is_one_hot
from dspark_batch.tensors import DraftBlock, VerifyPlan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EXPLORED_TOKENS = 4
_CLEAR_SAVING = 0.5
_PLAIN_EVERY_IN_DOUBT = 8
_PLAIN_EVERY = 64
"""Rounds after which one plain round is run if none was, so that the cost of plain decoding stays known."""


@dataclass(slots=True)
class _Round:
    """The round between its draft lengths and its outcome."""

    asked: Ints
    explores: bool
    confidence: Floats | None = None


class AutoLength:
    """A ``LengthPolicy`` that learns costs and acceptance while the job runs.

    max_draft_tokens: γ. may_use_draft: the plan may depend on the drafted tokens (coupled verification); one-hot drafts
    may always.
    """

    def __init__(self, *, max_draft_tokens: int, cost: StepCost | None = None, may_use_draft: bool = True) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._may_use_draft = may_use_draft
        self.cost = cost or StepCost()
        self.draft_cost = DraftCost()
        self._history = AcceptanceHistory(max_draft_tokens)
        self._scale = ConfidenceScale()
        self._gates: dict[int, Gate] = {}
        self._has_confidence = False
        self._round: _Round | None = None
        self._handles: frozenset[int] = frozenset()
        self._num_finished = 0
        self._rounds_drafted_in_a_row = 0

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        self._round = None
        num_rows = len(load.handles)
        nothing = [0] * num_rows
        self._note_finished(load)
        gate = self._gate(num_rows)
        if not gate.is_open:
            gate.skip()
            return nothing
        if self._is_time_for_a_plain_round(num_rows):
            return nothing
        limits = np.minimum(np.array(load.limits, np.int64), self._max_draft_tokens)
        explores = gate.is_first_after_pause
        if explores:
            lengths = self._a_few_rows(limits)
        else:
            lengths = limits if self._has_confidence else self._lengths_by_history(load, limits)
        if not lengths.any():
            gate.close()
            return nothing
        self._round = _Round(asked=lengths, explores=explores)
        chosen: list[int] = lengths.tolist()
        return chosen

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        assert self._round is not None, "a plan without draft lengths"
        offered = np.array([len(tokens) for tokens in draft.token_ids], np.int64)
        may_cut = self._may_use_draft or is_one_hot(draft)
        self._has_confidence = draft.confidence is not None and may_cut
        if not self._has_confidence:
            self._history.observe_offers(self._round.asked, offered)
        if not may_cut or not offered.any():
            return VerifyPlan(verify_len=offered.tolist())
        row = np.repeat(np.arange(len(offered)), offered)
        if draft.confidence is not None:
            self._round.confidence = np.concatenate([np.asarray(c, float) for c in draft.confidence])
            survival = _running_product(self._scale.chances(self._round.confidence), offered)
        else:
            by_position = self._history.survival(load.handles, self._max_draft_tokens)
            survival = by_position[row, _positions(offered)]
        if self._round.explores:
            return VerifyPlan(verify_len=offered.tolist())
        longest = int(self._round.asked.max())
        admitted = self._admit(load, survival, draft_s=self.draft_cost.seconds(len(offered), longest))
        lengths = np.bincount(row[admitted.mask], minlength=len(offered))
        if self._round.confidence is not None:
            self._round.confidence = self._round.confidence[_positions(offered) < lengths[row]]
        chosen: list[int] = lengths.tolist()
        return VerifyPlan(verify_len=chosen)

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        if 2 * outcome.num_prefill_tokens <= outcome.num_step_tokens:
            # Prompt tokens need no logits: a step that is mostly prompt would look too cheap for its size.
            self.cost.observe(outcome.num_step_tokens, outcome.step_s)
        current, self._round = self._round, None
        num_rows = len(load.handles)
        if current is None:
            self._rounds_drafted_in_a_row = 0
            return
        self._rounds_drafted_in_a_row += 1
        verified = np.array(outcome.num_verified, np.int64)
        accepted = np.array(outcome.num_accepted, np.int64)
        self.draft_cost.observe(num_rows, int(current.asked.max()), outcome.draft_s)
        if current.confidence is None:
            self._history.observe(load.handles, verified, accepted)
        elif len(current.confidence):
            reached = np.minimum(accepted + 1, verified)
            position, row = _positions(verified), np.repeat(np.arange(num_rows), verified)
            seen = position < reached[row]
            self._scale.observe(current.confidence[seen], (position < accepted[row])[seen])
        self._gate(num_rows).observe(self._saved(current, outcome, num_rows), num_rows=num_rows)

    def _saved(self, current: _Round, outcome: RoundOutcome, num_rows: int) -> float:
        """The share of a plain step that the round saved: its accepted tokens' worth, less the extra time."""
        num_extra = sum(outcome.num_verified)
        base = outcome.num_step_tokens - num_extra
        plain_s, before_s, after_s = self.cost.seconds(np.array([num_rows, base, base + num_extra])).tolist()
        draft_s = self.draft_cost.seconds(num_rows, int(current.asked.max()))
        # The step's own time, so that a wrong curve cannot keep drafting up; within bounds, against hiccups.
        took_s = min(max(outcome.step_s, 0.5 * after_s), 2.0 * after_s)
        gained = sum(outcome.num_accepted) / num_rows
        return float(gained - (took_s - before_s + draft_s) / plain_s)

    def _a_few_rows(self, limits: Ints) -> Ints:
        """Short drafts for an eighth of the rows, to learn whether anything has changed; all of it is verified."""
        self._history.age()
        self._scale.age()
        chosen = np.argsort(-limits, kind="stable")[: max(1, len(limits) // 8)]
        lengths = np.zeros_like(limits)
        lengths[chosen] = np.minimum(limits[chosen], _EXPLORED_TOKENS)
        return lengths

    def _lengths_by_history(self, load: RoundLoad, limits: Ints) -> Ints:
        """Lengths with the best expected rate; several longest lengths are tried where drafting costs by the token."""
        survival = self._history.survival(load.handles, self._max_draft_tokens)
        offered = self._history.offer_rates()
        num_rows = len(limits)
        # Plain decoding has no draft to pay for.
        best_rate, best = num_rows / float(self.cost.seconds(np.array([num_rows]))[0]), 0 * limits
        longest = int(limits.max(initial=0))
        while longest:
            allowed = np.minimum(limits, longest)
            row, position = np.repeat(np.arange(num_rows), allowed), _positions(allowed)
            draft_s = self.draft_cost.seconds(num_rows, longest)
            admitted = self._admit(load, survival[row, position], draft_s=draft_s, offered=offered[position])
            lengths: Ints = np.bincount(row[admitted.mask], minlength=num_rows)
            if admitted.tokens_per_s > best_rate:
                best_rate, best = admitted.tokens_per_s, lengths
            longest = min(longest // 2, int(lengths.max(initial=0)))
        return best

    def _admit(self, load: RoundLoad, survival: Floats, *, draft_s: float, offered: Floats | None = None) -> Admitted:
        num_rows = len(load.handles)
        base = num_rows + load.num_prefill_tokens
        plain_s, base_s = self.cost.seconds(np.array([num_rows, base])).tolist()

        def step_seconds(num_extra: Floats) -> Floats:
            # Prompt tokens of the same step are paid for anyway; they only move the place on the curve.
            seconds: Floats = self.cost.seconds(base + num_extra) - base_s + plain_s
            return seconds

        return admit(survival, num_rows=num_rows, step_seconds=step_seconds, draft_s=draft_s, offered=offered)

    def _gate(self, num_rows: int) -> Gate:
        """One gate for each power of two of rows: what pays in the tail need not pay in a full batch."""
        return self._gates.setdefault(num_rows.bit_length(), Gate())

    def _note_finished(self, load: RoundLoad) -> None:
        """Finished rows teach some drafters: whenever their number has doubled, drafting is tried again."""
        handles = frozenset(load.handles)
        gone = len(self._handles - handles)
        if gone:
            self._history.keep_only(handles)
            if (self._num_finished + gone).bit_length() > self._num_finished.bit_length():
                for gate in self._gates.values():
                    gate.hurry()
            self._num_finished += gone
        self._handles = handles

    def _is_time_for_a_plain_round(self, num_rows: int) -> bool:
        in_doubt = self._gate(num_rows).saved < _CLEAR_SAVING and not self.cost.is_known(num_rows)
        wait = _PLAIN_EVERY_IN_DOUBT if in_doubt else _PLAIN_EVERY
        if self._rounds_drafted_in_a_row < wait:
            return False
        since = self.cost.steps_since(num_rows)
        self._rounds_drafted_in_a_row = 0
        return since is None or since >= wait


def _positions(lengths: Ints) -> Ints:
    """Ragged lengths -> 0 .. n-1 for each, in one flat array."""
    first = np.cumsum(lengths) - lengths
    positions: Ints = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    return positions


def _running_product(chances: Floats, lengths: Ints) -> Floats:
    """Products over each row's chances, flat; chances above 1 count as 1, so that they never rise within a row."""
    logs = np.cumsum(np.log(np.clip(chances, 1e-9, 1.0)))
    first = np.cumsum(lengths) - lengths
    before = np.concatenate([[0.0], logs])[first]
    out: Floats = np.exp(logs - np.repeat(before, lengths))
    return out
