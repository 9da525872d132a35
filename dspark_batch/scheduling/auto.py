"""``schedule: auto``: draft where it pays, as long as it pays, judged by measured cost and observed acceptance.

Per round: a gate decides whether to draft at all (by what drafting saved lately in rounds of its kind), the acceptance
history how long, and after the draft its own word which tokens to verify. The objective is emitted tokens per second,
drafting included. Choices depend on step times; so in coupled mode outputs do not depend on them, and in the rejection
modes sampled drafts are cut by rules that have not seen what they cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dspark_batch.metrics import PlanReason
from dspark_batch.scheduling.cost import DraftCost, StepCost
from dspark_batch.scheduling.exploration import Exploration
from dspark_batch.scheduling.gate import Gate
from dspark_batch.scheduling.lengths import (
    CHEAP_DRAFT,
    AskedRows,
    best_lengths,
    costs_by_token,
    row_seconds,
    rows_worth_drafting,
)
from dspark_batch.scheduling.planner import LaggedBudgets, admit, admit_early_stop
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome, is_one_hot
from dspark_batch.scheduling.prices import Prices
from dspark_batch.scheduling.probes import SHORT_DRAFT_TOKENS, Probes
from dspark_batch.scheduling.rounds import DraftedRound
from dspark_batch.scheduling.standing import FullDrafts, Pace, PlainRounds, StandingPlan, StandingPlans
from dspark_batch.scheduling.survival import FEW_TOKENS, FlatDraft, SurvivalModel
from dspark_batch.scheduling.worth import RowWorth
from dspark_batch.tensors import DraftBlock, VerifyPlan

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CausalRule = Literal["early_stop", "lagged"]
Kind = tuple[int, bool]
"""What is judged together: the octave of rows, and whether some rows may be worth more than others."""

_CHEAP_ROUND = 1.2
_PROMISING = 0.02
_YOUNG_LABELS = 512
_FEWEST_LABELS = 16


class AutoLength:
    """A ``LengthPolicy`` that learns costs and acceptance while the job runs.

    max_draft_tokens: γ. cost: None where nothing was measured: then everything is drafted and verified. draft_cost: of
    the drafter, learned where it is not given. may_use_draft: the plan may depend on the drafted tokens (coupled
    verification); one-hot drafts may always. causal_rule: how sampled drafts are cut where it may not: by Algorithm 1,
    or by the budget that would have been best in the round before. expected_survival: what is known of the drafter
    from before, by draft position; () for nothing. learns_from_finished: whether drafts may get better as rows finish.
    """

    def __init__(
        self,
        *,
        max_draft_tokens: int,
        cost: StepCost | None,
        draft_cost: DraftCost | None = None,
        may_use_draft: bool = True,
        causal_rule: CausalRule = "lagged",
        expected_survival: Sequence[float] = (),
        learns_from_finished: bool = True,
    ) -> None:
        if cost is None:
            logger.warning("schedule auto has no cost table for this target: every draft is made and verified in full")
        self._max_draft_tokens = max_draft_tokens
        self._may_use_draft = may_use_draft
        self._learns_from_finished = learns_from_finished
        self.cost = cost
        self.draft_cost = draft_cost or DraftCost()
        self._prices = Prices(cost, self.draft_cost)
        self._model = SurvivalModel(max_draft_tokens, expected_survival)
        self._gates: dict[Kind, Gate] = {}
        self._worth = RowWorth()
        self._admit_causally = admit_early_stop if causal_rule == "early_stop" else LaggedBudgets().admit
        self._full_drafts = FullDrafts()
        self._exploration = Exploration()
        self._round: DraftedRound | None = None
        self._probes = Probes(self._prices, self.draft_cost, self._model, may_use_draft=may_use_draft)
        self._plain_rounds = PlainRounds()
        self._handles: Sequence[int] = ()
        self._plans = StandingPlans()
        self._standing: StandingPlan | None = None
        self._pace = Pace()
        self._asked_rows = AskedRows()
        self._kind: Kind = (0, False)
        self._row_worth: Floats | None = None
        self._reason = PlanReason.OFF

    @property
    def reason(self) -> PlanReason:
        return self._reason

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        self._round = self._standing = None
        if load.handles != self._handles:
            self._note_finished(load)
        self._kind = len(load.handles).bit_length(), self._worth.may_differ(load)
        gate = self._gates.get(self._kind)
        if gate is not None and gate.rests():
            self._reason = PlanReason.PAUSED
            return [0] * len(load.handles)
        if not any(load.limits):
            self._reason = PlanReason.AT_LIMIT
            return [0] * len(load.handles)
        if gate is not None and (standing := self._plans.find(self._kind, gate, load)) is not None:
            self._standing, self._reason = standing, PlanReason.STANDING
            return standing.asked
        limits = np.minimum(np.array(load.limits, np.int64), self._max_draft_tokens)
        lengths = self._choose_lengths(load, limits)
        if lengths.any():
            is_probe = self._reason is PlanReason.EXPLORE
            is_young = is_probe or not self._model.has_signal or self._model.num_labels < _YOUNG_LABELS
            is_lesson = self._pace.is_lesson(is_young=is_young)
            self._round = DraftedRound(lengths, self._row_worth, is_probe, is_lesson)
        chosen: list[int] = lengths.tolist()
        return chosen

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        if self._standing is not None:
            if self._standing.price <= 0.0:
                return VerifyPlan(verify_len=list(map(len, draft.token_ids)))
            prices = self._standing.prices(load.handles)
            return VerifyPlan(verify_len=self._model.lengths_above(draft, prices))
        current = self._round
        assert current is not None, "a plan without draft lengths"
        flat = FlatDraft.of(draft)
        is_legal = self._may_use_draft or is_one_hot(draft)
        current.draft, current.flat = draft, flat
        current.may_follow = is_legal and self._probes.sees_tokens
        if current.is_lesson:
            self._model.see(draft, flat, current.asked)
        if self.cost is None:
            return VerifyPlan(verify_len=flat.offered.tolist())
        if not len(flat.row):
            if current.is_probe:
                current.promise = self._prices.promise(load, current.asked, np.zeros(0), worth=current.worth)
            else:
                self._reason = PlanReason.NO_OFFER
            return VerifyPlan(verify_len=flat.offered.tolist())
        if current.is_probe and not current.may_follow:
            return VerifyPlan(verify_len=flat.offered.tolist())
        value = current.value(self._model.of_draft(load.handles, flat))
        if current.is_probe:
            if self._model.num_labels < _FEWEST_LABELS:
                return VerifyPlan(verify_len=[0] * len(flat.offered))
            current.promise = self._prices.promise(load, current.asked, value, worth=current.worth)
        lengths = self._verify_lengths(load, current, value, is_legal=is_legal)
        if current.is_probe and not load.num_prefill_tokens:
            lengths = np.maximum(lengths, self._probes.lengths_to_check(load, flat))
        if not lengths.any() and not current.is_probe:
            self._reason = PlanReason.NOT_WORTH_IT
        return VerifyPlan(verify_len=lengths.tolist())

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        current, self._round = self._round, None
        if self.cost is None:
            return
        self._probes.follow(load.handles, outcome.emitted)
        self._worth.observe(load, outcome)
        is_drafted = self._standing is not None or (current is not None and current.is_in_earnest)
        self._plain_rounds.count(len(load.handles), num_step_tokens=outcome.num_step_tokens, is_drafted=is_drafted)
        if self._standing is not None:
            self._standing.note(load, outcome)
            self._pace.skip()
            return
        is_lesson = current.is_lesson if current is not None else self._pace.is_lesson(is_young=False)
        self._prices.observe(load, outcome, is_lesson=is_lesson or self._reason is PlanReason.PLAIN_STEP)
        if current is None or current.flat is None:
            return
        self.draft_cost.observe(current.num_drafting, current.longest, outcome.draft_s)
        gate = self._gates[self._kind]
        if current.is_probe:
            self._probes.learn(load, current, outcome)
            cost_share = outcome.draft_s / self._prices.plain_s(load)
            gate.observe_probe(current.promise, num_rows=current.num_drafting, cost_share=cost_share)
            return
        if current.is_lesson:
            labels = current.labels(outcome, may_follow=current.may_follow)
            self._model.observe(load.handles, current.flat, *labels)
        gate.observe(self._prices.saved(load, current.asked, outcome, current.worth), num_rows=len(load.handles))
        self._let_stand(load, current, gate)

    def _let_stand(self, load: RoundLoad, current: DraftedRound, gate: Gate) -> None:
        """Make this round's plan a standing one, where drafting pays and planning takes more than it can gain."""
        is_small = len(load.handles) * self._max_draft_tokens <= FEW_TOKENS
        if not (is_small and gate.pays and current.price is not None and self._model.num_labels >= _FEWEST_LABELS):
            return
        asked: list[int] = current.asked.tolist()
        plan = StandingPlan.of_round(
            load,
            asked,
            most=self._max_draft_tokens,
            price=current.price,
            plain_s=self._prices.plain_s(load),
            worth=current.worth,
        )
        self._plans.put(self._kind, gate, load, plan)

    def _choose_lengths(self, load: RoundLoad, limits: Ints) -> Ints:
        """[R] lengths to ask for; sets the reason."""
        nothing = np.zeros_like(limits)
        if self.cost is None:
            self._reason = PlanReason.NO_TABLE
            return limits
        num_rows = len(limits)
        self._row_worth = None
        if self._kind[1]:
            share_of_rows = self._prices.share_of_rows(load)
            self._row_worth = self._worth.of_rows(load.num_left, share_of_rows=share_of_rows)
        gate = self._gate(load, limits)
        if not gate.is_open:
            is_due = gate.is_probe_due()
            self._reason = PlanReason.EXPLORE if is_due else PlanReason.PAUSED
            if not is_due:
                return nothing
            if gate.is_stale:
                self._model.age()
            return self._probes.lengths(load, limits, self._row_worth)
        seen = self._prices.seen(load, 0)
        if not load.num_prefill_tokens and self._plain_rounds.is_due(gate, num_rows, seen=seen):
            self._reason = PlanReason.PLAIN_STEP
            return nothing
        lengths = self._lengths_to_ask(load, limits)
        are_near_end = 2 * int(limits.sum()) < num_rows * self._max_draft_tokens
        if are_near_end and not self._best_lengths(load, limits)[0].any():
            lengths = nothing
        self._reason = PlanReason.DRAFTED if lengths.any() else PlanReason.NOT_WORTH_IT
        if not are_near_end and not lengths.any():
            gate.close()
        return lengths

    def _lengths_to_ask(self, load: RoundLoad, limits: Ints) -> Ints:
        """[R] lengths of an open gate. Where the drafter says which of its tokens are good, drafts are asked for in
        full, and trimmed afterwards."""
        num_rows, longest, plain_s = len(limits), int(limits.max(initial=0)), self._prices.plain_s(load)
        row_s = row_seconds(self.draft_cost, num_rows=num_rows, longest=longest)
        is_by_token = costs_by_token(self.draft_cost, num_rows=num_rows, longest=longest, plain_s=plain_s)
        if self._model.has_signal and not is_by_token and num_rows * row_s < CHEAP_DRAFT * plain_s:
            return limits * self._asked_rows.choose(load.handles, np.ones(num_rows, bool))
        if not self._model.has_signal or is_by_token:
            lengths, _ = self._best_lengths(load, limits)
            asked = limits if self._row_worth is None else limits * (lengths > 0)
            return np.minimum(asked, lengths.max(initial=0)) if self._model.has_signal else lengths
        token_s = self._prices.token_s(load, num_rows * self._max_draft_tokens)
        worth = rows_worth_drafting(self._expected(load), plain_s=plain_s, row_s=row_s, token_s=token_s)
        return limits * self._asked_rows.choose(load.handles, worth)

    def _expected(self, load: RoundLoad) -> Floats:
        """[R, K] chance that drafts will hold up to each position, times the worth of the row's tokens."""
        survival = self._model.history.survival(load.handles, self._max_draft_tokens)
        return survival if self._row_worth is None else survival * self._row_worth[:, None]

    def _best_lengths(self, load: RoundLoad, limits: Ints) -> tuple[Ints, float]:
        return best_lengths(
            limits,
            self._expected(load),
            offered=self._model.history.offer_rates(),
            step_seconds=self._prices.step_seconds(load),
            plain_s=self._prices.plain_s(load),
            draft_cost=self.draft_cost,
        )

    def _verify_lengths(self, load: RoundLoad, current: DraftedRound, value: Floats, *, is_legal: bool) -> Ints:
        assert current.flat is not None, "set by verify_plan"
        flat, num_rows = current.flat, len(load.handles)
        draft_s = self.draft_cost.seconds(current.num_drafting, current.longest)
        rule = admit if is_legal or flat.features is None else self._admit_causally
        step_seconds = self._prices.step_seconds(load)
        admitted = rule(value, num_rows=num_rows, step_seconds=step_seconds, draft_s=draft_s)
        lengths: Ints = np.bincount(flat.row[admitted.mask], minlength=num_rows)
        if is_legal and flat.features is not None:
            current.price = admitted.price
            if current.is_lesson and not current.is_probe:
                seen = self._prices.seen(load, len(flat.row))
                lengths = flat.offered if self._full_drafts.are_due(admitted.gain, seen=seen) else lengths
        elif admitted.mask.all() and all(current.asked >= np.minimum(load.limits, self._max_draft_tokens)):
            current.price = 0.0
        if not current.may_follow:
            explored = self._exploration.next_row(num_rows)
            if explored is not None:
                lengths[explored] = flat.offered[explored]
        return lengths

    def _gate(self, load: RoundLoad, limits: Ints) -> Gate:
        """One gate for each kind of rounds: what pays in the tail need not pay in a full batch. It begins open where
        what is known of the job or of the drafter promises a gain, or where a short draft for every row takes next to
        nothing."""
        num_rows = len(limits)
        if self._kind not in self._gates:
            if self._model.num_labels >= _FEWEST_LABELS:
                whole = np.full_like(limits, self._max_draft_tokens)  # rows near their end say nothing of others
                is_open = self._best_lengths(load, whole)[1] > 1.0 + _PROMISING
            else:
                short = np.array([0.0, float(SHORT_DRAFT_TOKENS * num_rows)])
                plain_s, drafted_s = self._prices.step_seconds(load)(short).tolist()
                drafted_s += self.draft_cost.seconds(num_rows, self._max_draft_tokens)
                is_open = drafted_s < _CHEAP_ROUND * plain_s
            self._gates[self._kind] = Gate(is_open=is_open)
        return self._gates[self._kind]

    def _note_finished(self, load: RoundLoad) -> None:
        """Where they teach the drafter, drafting is tried again whenever their number has doubled."""
        gone = len(set(self._handles).difference(load.handles))
        self._handles = load.handles
        if gone:
            self._model.history.keep_only(load.handles)
            before = self._worth.num_finished
            self._worth.num_finished += gone
            if self._learns_from_finished and (before + gone).bit_length() > before.bit_length():
                for gate in self._gates.values():
                    gate.hurry()
