"""One round for all active rows: draft, plan, verify with prefill chunks in one target forward, commit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor

from dspark_batch.core import ErrorCode, FinishReason, RowError
from dspark_batch.drafters.base import Committed, Drafter
from dspark_batch.engine.constrained import forced_drafts, with_forced, within_constraints
from dspark_batch.engine.layout import Part, forward_batch, lay_out
from dspark_batch.engine.prefixes import Prefix
from dspark_batch.engine.state import RowState
from dspark_batch.metrics import StepRecord
from dspark_batch.sampling.sampler import GreedyDraws, PositionBatch, SampledRow
from dspark_batch.scheduling.policies import LengthPolicy, RoundLoad, RoundOutcome
from dspark_batch.tensors import DraftBlock, OffersFastDraws, Target
from dspark_batch.verification.base import Verifier, VerifyRow

logger = logging.getLogger(__name__)

_LOGIT_ELEMENTS = 2**24
"""Logits held at a time, in float32 elements; bounds the memory of sampling."""


@dataclass(slots=True)
class _Tally:
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    num_finished: int = 0
    logits_s: float = 0.0
    accepted: list[int] = field(default_factory=list)
    emitted: list[Sequence[int]] = field(default_factory=list)


class StepRunner:
    """Runs rounds over rows that hold KV slots. Keeps no row between calls."""

    def __init__(
        self,
        target: Target,
        *,
        drafter: Drafter,
        policy: LengthPolicy,
        verifier: Verifier,
        max_step_tokens: int,
        poison_dead_kv: bool = False,
    ) -> None:
        self._target = target
        self._fast = target.fast_draws if isinstance(target, OffersFastDraws) else None
        self._drafter = drafter
        self._policy = policy
        self._verifier = verifier
        self._max_step_tokens = max_step_tokens
        self._poison_dead_kv = poison_dead_kv
        self._max_logit_positions = max(1, _LOGIT_ELEMENTS // target.vocab_size)

    @torch.inference_mode()
    def run(self, rows: Sequence[RowState], prefixes: Sequence[Prefix], *, num_queued: int) -> StepRecord:
        """Advance every row that can go on. Finished and failed rows carry ``finish_reason`` or ``error`` afterwards.

        ``rows``: at most ``max_step_tokens`` of them. ``prefixes``: shared prefixes with tokens left to compute.
        """
        started = perf_counter()
        decoding = [row for row in rows if row.num_output]
        filling = [row for row in rows if not row.num_output]
        num_pending = sum(p.num_pending for p in prefixes) + sum(row.num_pending for row in filling)
        num_drafted_before = sum(row.num_drafted for row in decoding)
        limits = self._limits(decoding, num_pending=num_pending)
        forced = forced_drafts(decoding, limits)
        for row, must in zip(decoding, forced, strict=True):
            row.num_drafted += len(must)
        load = self._load(decoding, limits, forced, num_pending=num_pending, num_queued=num_queued)
        block, num_planned, draft_s = self._draft(decoding, load)
        drafts = with_forced(block, forced)
        parts, token_ids = lay_out(decoding, drafts, [*prefixes, *filling], max_step_tokens=self._max_step_tokens)
        if not parts:
            return StepRecord(num_queued=num_queued, host_s=perf_counter() - started)

        forward_from = perf_counter()
        batch = forward_batch(parts, token_ids, taps=self._drafter.taps, device=self._target.device)
        output = self._target.forward(batch)
        sample_from = perf_counter()
        tally = self._decide([part for part in parts if part.wants_logits], output.hidden)
        self._advance(parts, output.features)
        commit_until = perf_counter()
        num_verify = sum(len(p.draft) + 1 for p in parts[: len(decoding)])
        outcome = RoundOutcome(
            num_verified=[0 if must else len(p.draft) for must, p in zip(forced, parts, strict=False)],
            num_accepted=[0 if must else num for must, num in zip(forced, tally.accepted, strict=False)],
            num_step_tokens=len(token_ids),
            num_prefill_tokens=len(token_ids) - num_verify + sum(map(len, forced)),
            draft_s=draft_s,
            step_s=commit_until - started - draft_s,
            emitted=tally.emitted[: len(decoding)],
        )
        if decoding:
            self._policy.observe(load, outcome)
        forward_s = sample_from - forward_from + tally.logits_s
        sample_s = commit_until - sample_from - tally.logits_s
        record = StepRecord(
            num_rows=len(decoding),
            num_prefill_tokens=len(token_ids) - num_verify,
            num_verify_tokens=num_verify,
            num_planned_draft_tokens=num_planned,
            num_drafted_tokens=sum(row.num_drafted for row in decoding) - num_drafted_before,
            num_verified_draft_tokens=num_verify - len(decoding),
            num_accepted_tokens=tally.num_accepted_tokens,
            num_emitted_tokens=tally.num_emitted_tokens,
            num_finished=tally.num_finished,
            num_queued=num_queued,
            draft_s=draft_s,
            forward_s=forward_s,
            sample_s=sample_s,
            host_s=perf_counter() - started - draft_s - forward_s - sample_s,
            reason=self._policy.reason if decoding and self._drafter.max_draft_tokens else None,
            draft_lengths=outcome.num_verified,
            accepted_lengths=outcome.num_accepted,
        )
        logger.debug("%s", record)
        return record

    def _limits(self, rows: Sequence[RowState], *, num_pending: int) -> list[int]:
        """[R] the longest draft of each row."""
        spare = self._max_step_tokens - len(rows)
        assert spare >= 0, "more rows than max_step_tokens"
        share = (spare // 2 if num_pending else spare) // max(1, len(rows))
        # The anchor's own prediction is always emitted, so a draft is one shorter than what is left.
        return [min(share, row.num_left - 1) for row in rows]

    def _load(
        self,
        rows: Sequence[RowState],
        limits: Sequence[int],
        forced: Sequence[Sequence[int]],
        *,
        num_pending: int,
        num_queued: int,
    ) -> RoundLoad:
        """The round as the policy sees it: tokens that have to come are computed like those of a prompt."""
        num_forced = sum(map(len, forced))
        spare = self._max_step_tokens - len(rows) - num_forced
        return RoundLoad(
            handles=[row.draft_row.handle for row in rows],
            limits=[0 if must else limit for must, limit in zip(forced, limits, strict=True)],
            num_prefill_tokens=min(num_pending, spare) + num_forced,
            num_queued=num_queued,
            context_tokens=sum(row.kv_len for row in rows) / max(1, len(rows)),
            num_left=[row.num_left for row in rows],
        )

    def _draft(self, rows: Sequence[RowState], load: RoundLoad) -> tuple[DraftBlock, int, float]:
        """The drafts to verify, already cut to the plan; how many tokens the drafter was asked for; and its seconds."""
        nothing = DraftBlock(token_ids=[()] * len(rows))
        if not rows or not self._drafter.max_draft_tokens:
            return nothing, 0, 0.0
        lengths = self._policy.draft_lengths(load)
        if not any(lengths):
            return nothing, 0, 0.0
        started = perf_counter()
        block = self._drafter.propose([row.draft_row for row in rows], lengths)
        block = within_constraints(rows, block, may_cut_sampled=not self._verifier.needs_draft_probs)
        draft_s = perf_counter() - started
        plan = self._policy.verify_plan(load, block)
        for row, tokens, limit, length in zip(rows, block.token_ids, lengths, plan.verify_len, strict=True):
            assert len(tokens) <= limit, f"{self._drafter.name} drafted {len(tokens)} tokens, {limit} were asked for"
            assert 0 <= length <= len(tokens), f"a verify length of {length} for {len(tokens)} drafted tokens"
            row.num_drafted += len(tokens)
        cut = [tokens[:length] for tokens, length in zip(block.token_ids, plan.verify_len, strict=True)]
        return DraftBlock(token_ids=cut, probs=block.probs), sum(lengths), draft_s

    def _decide(self, parts: Sequence[Part], hidden: Tensor) -> _Tally:
        """Logits, verification and commit; choices are scored."""
        tally = _Tally()
        if any(part.is_scored for part in parts):
            parts, hidden = self._score(parts, hidden, tally)
        if parts and self._fast is not None and all(map(_is_plain_greedy, parts)):
            started = perf_counter()
            draws = GreedyDraws(*self._fast.greedy(hidden))
            tally.logits_s += perf_counter() - started
            self._settle(parts, draws, tally)
            return tally
        for some, logits in self._logits(parts, hidden, tally):
            self._decide_some(some, logits, tally)
        return tally

    def _score(self, parts: Sequence[Part], hidden: Tensor, tally: _Tally) -> tuple[Sequence[Part], Tensor]:
        """Read what is wanted of the parts that are scored; the others, and their hidden states."""
        is_scored = [part.is_scored for part in parts for _ in range(part.num_positions)]
        mask = torch.tensor(is_scored, device=hidden.device)
        scored = [part for part in parts if part.is_scored]
        for some, logits in self._logits(scored, hidden[mask], tally):
            _score_some(some, logits, tally)
        return [part for part in parts if not part.is_scored], hidden[~mask]

    def _logits(self, parts: Sequence[Part], hidden: Tensor, tally: _Tally) -> Iterator[tuple[Sequence[Part], Tensor]]:
        """Parts with their logits, for as many whole parts at a time as the logit memory allows."""
        first, flat = 0, 0
        while first < len(parts):
            last, num_positions = first, 0
            while last < len(parts):
                more = parts[last].num_positions
                if num_positions and num_positions + more > self._max_logit_positions:
                    break
                num_positions += more
                last += 1
            started = perf_counter()
            logits = self._target.logits(hidden[flat : flat + num_positions])
            tally.logits_s += perf_counter() - started
            yield parts[first:last], logits
            first, flat = last, flat + num_positions

    def _decide_some(self, parts: Sequence[Part], logits: Tensor, tally: _Tally) -> None:
        rows = [part.owner for part in parts if isinstance(part.owner, RowState)]
        draws = PositionBatch(
            logits,
            [
                SampledRow(
                    row.sampling,
                    row.draft_row.noise_key,
                    len(row.token_ids),
                    part.draft,
                    row.seen.view() if row.seen is not None else None,
                    row.matcher.masks(part.draft) if row.matcher is not None else None,
                )
                for row, part in zip(rows, parts, strict=True)
            ],
            fast=self._fast,
        )
        wanted = self._settle(parts, draws, tally)
        _record_logprobs(draws, wanted)

    def _settle(
        self, parts: Sequence[Part], draws: PositionBatch | GreedyDraws, tally: _Tally
    ) -> list[tuple[RowState, int, list[int]]]:
        """Verify and commit; (row, first flat position, emitted tokens) of rows that want log-probabilities."""
        rows = [part.owner for part in parts if isinstance(part.owner, RowState)]
        finite = draws.finite()
        verdict = self._verifier.verify([_verify_row(row, part) for row, part in zip(rows, parts, strict=True)], draws)
        tally.accepted.extend(verdict.num_accepted)
        flat = 0
        wanted: list[tuple[RowState, int, list[int]]] = []
        for row, part, accepted, after in zip(rows, parts, verdict.num_accepted, verdict.next_token, strict=True):
            emitted: list[int] = []
            if row.matcher is not None and row.matcher.error is not None:
                row.error = _constraint_error(row, row.matcher.error)
                tally.num_finished += 1
            elif all(finite[flat : flat + accepted + 1]):
                emitted = _commit(row, [*part.draft[:accepted], after], accepted, tally)
                if row.sampling.logprobs is not None:
                    wanted.append((row, flat, emitted))
            else:
                row.error = _non_finite_error(row)
                tally.num_finished += 1
            tally.emitted.append(emitted)
            flat += len(part.draft) + 1
        return wanted

    def _advance(self, parts: Sequence[Part], features: Tensor | None) -> None:
        """Move every owner's ``kv_len`` to what is now valid, and tell a drafter with taps."""
        committed: list[Committed] = []
        for part in parts:
            owner = part.owner
            start = owner.kv_len
            if isinstance(owner, Prefix):
                owner.kv_len += part.num_tokens
                if features is not None:
                    owner.features.append(features[part.offset : part.offset + part.num_tokens].clone())
                continue
            if owner.error is not None:
                continue
            if part.is_scored:
                # The last token of the prompt comes again before each path of the choices.
                owner.kv_len = min(len(owner.token_ids) - 1, start + part.num_tokens)
                self._poison(owner)
                continue
            if part.wants_logits:
                # A constrained text may have ended with tokens that no forward has seen.
                owner.kv_len = min(len(owner.token_ids) - 1, start + part.num_tokens)
            else:
                owner.kv_len += part.num_tokens
            assert start < owner.kv_len <= start + part.num_tokens, "a round commits between 1 and all of its tokens"
            if features is not None:
                if owner.prefix is not None and start == owner.prefix.num_tokens:
                    shared = Committed(owner.draft_row, 0, start, 0)
                    self._drafter.observe([shared], owner.prefix.prefix.all_features())
                committed.append(Committed(owner.draft_row, start, owner.kv_len - start, part.offset))
            self._poison(owner)
        if features is not None:
            self._drafter.observe(committed, features)

    def _poison(self, row: RowState) -> None:
        if self._poison_dead_kv:
            self._target.kv.poison(row.slot, row.kv_len)


def _score_some(parts: Sequence[Part], logits: Tensor, tally: _Tally) -> None:
    rows = [part.owner for part in parts if isinstance(part.owner, RowState)]
    walks = [row.choices for row in rows if row.choices is not None]
    flat, places, tokens = 0, list[int](), list[int]()
    for part, walk in zip(parts, walks, strict=True):
        places.extend(flat + place for place in walk.path.places)
        tokens.extend(walk.path.tokens)
        flat += part.num_positions
    found = iter(logits.log_softmax(-1)[places, tokens].tolist())
    for row, walk in zip(rows, walks, strict=True):
        logprobs = list(islice(found, len(walk.path.tokens)))
        if not all(map(math.isfinite, logprobs)):
            row.error = _non_finite_error(row)
        elif walk.take(logprobs):
            row.finish_reason = FinishReason.STOP
            tally.num_emitted_tokens += len(walk.tree.token_ids[walk.best])
        tally.num_finished += row.error is not None or row.finish_reason is not None


def _non_finite_error(row: RowState) -> RowError:
    return RowError(
        code=ErrorCode.NON_FINITE_LOGITS,
        message=f"{row.request.id!r}: the target gave NaN or infinite logits after {row.num_output} tokens",
        retryable=True,
    )


def _is_plain_greedy(part: Part) -> bool:
    """Whether the arg-max of the target's own logits is all that the part needs."""
    if not isinstance(part.owner, RowState):
        return False
    sampling = part.owner.sampling
    is_pure = sampling.repetition_penalty == 1.0 and sampling.constraint is None
    return sampling.is_greedy and is_pure and sampling.logprobs is None


def _constraint_error(row: RowState, why: str) -> RowError:
    message = f"{row.request.id!r}: after {row.num_output} tokens the constraint cannot be followed: {why}"
    return RowError(code=ErrorCode.CONSTRAINT_ERROR, message=message)


def _verify_row(row: RowState, part: Part) -> VerifyRow:
    probs = part.draft_probs
    return VerifyRow(
        sampling=row.sampling,
        noise_key=row.draft_row.noise_key,
        request_id=row.request.id,
        sample=row.sample,
        # The first token, drawn from the prefill, takes round 0; num_rounds counts from the round after it.
        round_index=row.num_rounds + bool(row.num_output),
        draft=part.draft,
        draft_probs=probs[: len(part.draft)] if probs is not None else None,
    )


def _commit(row: RowState, tokens: list[int], num_accepted: int, tally: _Tally) -> list[int]:
    """Append tokens up to a stop or the length limit (invariant 6); gives those that were emitted."""
    if row.num_output:
        row.num_rounds += 1
    num_emitted = 0
    for token in tokens:
        num_emitted += 1
        if row.commit(token):
            break
    else:
        tokens = [*tokens, *row.commit_ending()]
        num_emitted = len(tokens)
    tally.num_finished += row.finish_reason is not None
    num_accepted = min(num_accepted, num_emitted)
    row.num_accepted += num_accepted
    tally.num_accepted_tokens += num_accepted
    tally.num_emitted_tokens += num_emitted
    return tokens[:num_emitted]


def _record_logprobs(draws: PositionBatch, wanted: Sequence[tuple[RowState, int, list[int]]]) -> None:
    if not wanted:
        return
    positions = [flat + j for _, flat, emitted in wanted for j in range(len(emitted))]
    tokens = [token for _, _, emitted in wanted for token in emitted]
    num_top = max(row.sampling.logprobs or 0 for row, _, _ in wanted)
    found = iter(draws.logprobs(positions, tokens, num_top))
    for row, _, emitted in wanted:
        keep = row.sampling.logprobs or 0
        row.logprobs.extend(next(found).truncated(keep) for _ in emitted)
