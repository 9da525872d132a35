"""The engine's loop without a model: real policies, counted tokens, a made-up clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dspark_batch.metrics import EngineStats, StepRecord
from dspark_batch.scheduling.policies import LengthPolicy, RoundLoad, RoundOutcome
from dspark_batch.scheduling.simulator.acceptance import AcceptanceModel, SimulatedDrafts
from dspark_batch.scheduling.simulator.device import Device, StepWork
from dspark_batch.tensors import DraftBlock

Ints = NDArray[np.int64]

_WRONG_TOKEN = -1
"""The token at place n of an output is n, so a drafted token is right or this."""


@dataclass(frozen=True, slots=True)
class SimulatedRow:
    """One row of a job, in tokens. output_len: where it ends by itself; at most ``max_new_tokens``, which is all that
    the schedule knows."""

    prompt_len: int
    output_len: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        assert self.prompt_len >= 1, "an empty prompt"
        assert 1 <= self.output_len <= self.max_new_tokens, "an output past its limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """A whole job. wall_s: simulated. full_s, num_full_tokens: while rows were waiting; the rest is the tail.

    planning_s: real time spent in the policy; part of ``wall_s`` only where that was asked for. mean_rows: rows decoded
    together.
    """

    stats: EngineStats
    wall_s: float
    full_s: float
    num_full_tokens: int
    planning_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.stats.num_emitted_tokens / self.wall_s

    @property
    def tail_s(self) -> float:
        return self.wall_s - self.full_s

    @property
    def mean_rows(self) -> float:
        return self.stats.num_row_rounds / max(1, self.stats.num_steps)

    def __add__(self, other: SimulatedRun) -> SimulatedRun:
        """Both jobs, one after the other."""
        return SimulatedRun(
            stats=self.stats + other.stats,
            wall_s=self.wall_s + other.wall_s,
            full_s=self.full_s + other.full_s,
            num_full_tokens=self.num_full_tokens + other.num_full_tokens,
            planning_s=self.planning_s + other.planning_s,
        )


@dataclass(slots=True, eq=False)
class _Active:
    """A row that holds KV. num_kv: tokens whose keys are written; while it decodes, all but the last."""

    number: int
    row: SimulatedRow
    num_kv: int = 0
    num_output: int = 0


class SimulatedEngine:
    """``BatchEngine``'s rounds: admission by places and KV room in order of arrival, drafting, planning, verification
    with prefill chunks within ``max_step_tokens``, commit. No shared prefixes, no failures.

    counts_planning: the real time that the policy takes is part of the clock.
    """

    def __init__(
        self,
        rows: Sequence[SimulatedRow],
        *,
        device: Device,
        policy: LengthPolicy,
        acceptance: AcceptanceModel,
        max_concurrency: int,
        max_step_tokens: int = 2048,
        counts_planning: bool = False,
    ) -> None:
        self._counts_planning = counts_planning
        self._queue = deque(_Active(number, row) for number, row in enumerate(rows))
        self._device = device
        self._policy = policy
        self._acceptance = acceptance
        self._max_concurrency = min(max_concurrency, max_step_tokens)
        self._max_step_tokens = max_step_tokens
        self._rows: list[_Active] = []
        self._num_reserved = 0
        self.stats = EngineStats()
        self.planning_s = 0.0

    @property
    def num_unfinished(self) -> int:
        return len(self._queue) + len(self._rows)

    def run(self) -> SimulatedRun:
        """The job to its end."""
        wall_s = full_s = 0.0
        num_full_tokens = 0
        while self.num_unfinished:
            planned_s = self.planning_s
            record = self.step()
            seconds = record.draft_s + record.forward_s
            if self._counts_planning:
                seconds += self.planning_s - planned_s
            wall_s += seconds
            if record.num_queued:
                full_s += seconds
                num_full_tokens += record.num_emitted_tokens
        return SimulatedRun(
            stats=self.stats,
            wall_s=wall_s,
            full_s=full_s,
            num_full_tokens=num_full_tokens,
            planning_s=self.planning_s,
        )

    def step(self) -> StepRecord:
        """One round. ``forward_s`` of the record is the whole step without its drafting."""
        self._admit()
        decoding = [active for active in self._rows if active.num_output]
        filling = [active for active in self._rows if not active.num_output]
        load = self._load(decoding, filling)
        drafts, verified, num_planned, draft_s = self._draft(decoding, load)
        accepted = np.minimum(drafts.num_held, verified)
        num_verify = len(decoding) + int(verified.sum())
        num_prefill, ended = self._prefill(filling, self._max_step_tokens - num_verify)
        work = StepWork(
            num_rows=len(decoding),
            num_tokens=num_verify + num_prefill,
            num_logits=num_verify + len(ended),
            num_context_tokens=sum(active.num_kv for active in decoding),
        )
        step_s = self._device.step_s(work)
        num_emitted = [
            min(held + 1, active.row.output_len - active.num_output)
            for active, held in zip(decoding, accepted.tolist(), strict=True)
        ]
        for active, emitted in zip(decoding, num_emitted, strict=True):
            active.num_kv += emitted
            active.num_output += emitted
        for active in ended:
            active.num_output = 1
        if decoding:
            outcome = RoundOutcome(
                num_verified=verified.tolist(),
                num_accepted=accepted.tolist(),
                num_step_tokens=work.num_tokens,
                num_prefill_tokens=num_prefill,
                draft_s=draft_s,
                step_s=step_s,
                emitted=[
                    range(active.num_output - emitted, active.num_output)
                    for active, emitted in zip(decoding, num_emitted, strict=True)
                ],
            )
            self._observe(load, outcome)
        record = StepRecord(
            num_rows=len(decoding),
            num_prefill_tokens=num_prefill,
            num_verify_tokens=num_verify,
            num_planned_draft_tokens=num_planned,
            num_drafted_tokens=int(drafts.num_offered.sum()),
            num_verified_draft_tokens=num_verify - len(decoding),
            num_accepted_tokens=sum(
                min(held, emitted) for held, emitted in zip(accepted.tolist(), num_emitted, strict=True)
            ),
            num_emitted_tokens=sum(num_emitted) + len(ended),
            num_finished=self._retire(),
            num_queued=len(self._queue),
            draft_s=draft_s,
            forward_s=step_s,
            reason=self._policy.reason if decoding else None,
            draft_lengths=verified.tolist(),
            accepted_lengths=accepted.tolist(),
        )
        self.stats.add(record)
        return record

    def _admit(self) -> None:
        while self._queue and len(self._rows) < self._max_concurrency:
            row = self._queue[0].row
            reserved = row.prompt_len + row.max_new_tokens
            assert reserved <= self._device.num_kv_tokens, "a row that the device could never hold"
            if self._num_reserved + reserved > self._device.num_kv_tokens:
                return
            self._num_reserved += reserved
            self._rows.append(self._queue.popleft())

    def _load(self, decoding: Sequence[_Active], filling: Sequence[_Active]) -> RoundLoad:
        num_pending = sum(active.row.prompt_len - active.num_kv for active in filling)
        spare = self._max_step_tokens - len(decoding)
        share = (spare // 2 if num_pending else spare) // max(1, len(decoding))
        num_left = [active.row.max_new_tokens - active.num_output for active in decoding]
        return RoundLoad(
            handles=[active.number for active in decoding],
            limits=[min(share, left - 1) for left in num_left],
            num_prefill_tokens=min(num_pending, spare),
            num_queued=len(self._queue),
            context_tokens=sum(active.num_kv for active in decoding) / max(1, len(decoding)),
            num_left=num_left,
        )

    def _draft(self, decoding: Sequence[_Active], load: RoundLoad) -> tuple[SimulatedDrafts, Ints, int, float]:
        """The drafts, [R] verified tokens, tokens asked for, and simulated seconds."""
        nothing = np.zeros(len(decoding), np.int64)
        none = SimulatedDrafts(nothing, nothing)
        if not decoding:
            return none, nothing, 0, 0.0
        started = perf_counter()
        lengths = np.array(self._policy.draft_lengths(load), np.int64)
        self.planning_s += perf_counter() - started
        if not lengths.any():
            return none, nothing, 0, 0.0
        drafts = self._acceptance.draft(load.handles, lengths)
        drafted: list[int] = np.flatnonzero(lengths).tolist()
        draft_s = self._device.draft_s(
            num_rows=len(drafted),
            longest=int(lengths.max()),
            num_context_tokens=sum(decoding[r].num_kv for r in drafted),
        )
        block = DraftBlock(
            token_ids=[
                [active.num_output + k if k < held else _WRONG_TOKEN for k in range(offered)]
                for active, offered, held in zip(
                    decoding, drafts.num_offered.tolist(), drafts.num_held.tolist(), strict=True
                )
            ],
            confidence=drafts.confidence,
            margin=drafts.margin,
        )
        started = perf_counter()
        plan = self._policy.verify_plan(load, block)
        self.planning_s += perf_counter() - started
        verified = np.array(plan.verify_len, np.int64)
        assert (lengths <= load.limits).all(), "more was asked for than a row can use"
        assert (verified <= drafts.num_offered).all(), "more is verified than was drafted"
        return drafts, verified, int(lengths.sum()), draft_s

    def _prefill(self, filling: Sequence[_Active], room: int) -> tuple[int, list[_Active]]:
        """Prompt tokens of this step, and the rows whose prompt ends with it."""
        num_tokens, ended = 0, []
        for active in filling:
            chunk = min(active.row.prompt_len - active.num_kv, room - num_tokens)
            if chunk <= 0:
                break
            num_tokens += chunk
            active.num_kv += chunk
            if active.num_kv == active.row.prompt_len:
                ended.append(active)
        return num_tokens, ended

    def _observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        started = perf_counter()
        self._policy.observe(load, outcome)
        self.planning_s += perf_counter() - started

    def _retire(self) -> int:
        staying = [active for active in self._rows if active.num_output < active.row.output_len]
        num_finished = len(self._rows) - len(staying)
        if num_finished:
            leaving = [active for active in self._rows if active.num_output >= active.row.output_len]
            self._num_reserved -= sum(a.row.prompt_len + a.row.max_new_tokens for a in leaving)
        self._rows = staying
        return num_finished
