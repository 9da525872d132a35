"""The simulated loop against the real engine, step by step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.metrics import PlanReason, StepRecord
from dspark_batch.scheduling.cost_table import CostTable, DraftSample, StepSample
from dspark_batch.scheduling.policies import FixedLength, LengthPolicy, RoundLoad, RoundOutcome
from dspark_batch.scheduling.simulator.acceptance import ParametricAcceptance, SimulatedDrafts
from dspark_batch.scheduling.simulator.device import ProfiledDevice
from dspark_batch.scheduling.simulator.loop import SimulatedEngine, SimulatedRow
from dspark_batch.scheduling.traces import RecordedRound, TraceRecorder, rounds_by_row
from dspark_batch.tensors import DraftBlock, VerifyPlan
from dspark_batch.testing.scripted_drafters import ScriptedDrafter
from dspark_batch.testing.scripted_target import ScriptedModel, ScriptedTarget

Ints = NDArray[np.int64]
TABLE = CostTable(
    steps=(StepSample(0, 1, 1, 0.010), StepSample(0, 1, 64, 0.020)),
    drafts=(DraftSample(1, 1, 0.0011), DraftSample(64, 1, 0.0074)),
)
DEVICE = ProfiledDevice(TABLE)
TIMES = {"draft_s", "forward_s", "sample_s", "host_s"}


class EveryThird:
    """Plain in two rounds of three; the drafts of the third are asked for in full and verified in full."""

    reason = PlanReason.FIXED

    def __init__(self, num_tokens: int) -> None:
        self._fixed = FixedLength(num_tokens)
        self._num_rounds = 0

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        self._num_rounds += 1
        return self._fixed.draft_lengths(load) if self._num_rounds % 3 == 0 else [0] * len(load.handles)

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        return self._fixed.verify_plan(load, draft)

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None: ...


class Guessing(ScriptedDrafter):
    """One token or more, some of them right by chance: the vocabulary is small."""

    def draft(self, row: DraftRow, limit: int) -> list[int]:
        rng = random.Random(row.handle * 1000 + len(row.token_ids))
        return [rng.randrange(4) for _ in range(rng.randint(1, limit) if limit else 0)]


class Replay:
    """The recorded drafts of every row by its handle, which is its place in the queue."""

    num_positions = 6

    def __init__(self, rounds: Sequence[RecordedRound]) -> None:
        self._rows = {handle: iter(drafts) for handle, drafts in rounds_by_row(rounds).items()}

    def draft(self, rows: Sequence[int], lengths: Ints) -> SimulatedDrafts:
        offered, held = np.zeros_like(lengths), np.zeros_like(lengths)
        for r in np.flatnonzero(lengths):
            draft = next(self._rows[rows[r]])
            offered[r], held[r] = draft.num_offered, draft.num_accepted
        return SimulatedDrafts(offered, held)


def job(seed: int) -> list[SimulatedRow]:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 7, 11, 19, 23]) for _ in range(17)]
    return [SimulatedRow(rng.choice([1, 5, 13, 29, 40]), length, length) for length in lengths]


def real_steps(
    rows: Sequence[SimulatedRow], policy: LengthPolicy, *, kv_tokens: int, max_step_tokens: int
) -> tuple[list[StepRecord], list[RecordedRound]]:
    target = ScriptedTarget(vocab_size=4, num_kv_tokens=kv_tokens)
    config = EngineConfig(max_concurrency=5, max_step_tokens=max_step_tokens, share_prefixes=False)
    recorder = TraceRecorder(policy)
    records = []
    drafter = Guessing(max_draft_tokens=6)
    model = ScriptedModel(target=target, eos_token_ids=frozenset())
    with BatchEngine(model, config, drafter=drafter, policy=recorder) as engine:
        for number, row in enumerate(rows):
            sampling = SamplingParams(max_new_tokens=row.max_new_tokens, ignore_eos=True)
            prompt = tuple((number + k) % 4 for k in range(row.prompt_len))
            engine.add(Request(id=str(number), prompt_token_ids=prompt, sampling=sampling))
        while engine.num_unfinished:
            engine.step()
            assert engine.stats.last is not None
            records.append(engine.stats.last)
    return records, recorder.rounds


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", [FixedLength, EveryThird])
@pytest.mark.parametrize(("kv_tokens", "max_step_tokens"), [(4096, 2048), (150, 24)], ids=["roomy", "tight"])
def test_its_rounds_are_those_of_the_engine(
    seed: int, policy: type[FixedLength] | type[EveryThird], kv_tokens: int, max_step_tokens: int
) -> None:
    """A trace of the engine, replayed: the same rows together, prompt chunks, drafts, verified and emitted tokens."""
    rows = job(seed)
    expected, rounds = real_steps(rows, policy(6), kv_tokens=kv_tokens, max_step_tokens=max_step_tokens)
    device = ProfiledDevice(TABLE, num_kv_tokens=kv_tokens)
    engine = SimulatedEngine(
        rows,
        device=device,
        policy=policy(6),
        acceptance=Replay(rounds),
        max_concurrency=5,
        max_step_tokens=max_step_tokens,
    )
    found = []
    while engine.num_unfinished:
        found.append(engine.step())
    names = [f.name for f in fields(StepRecord) if f.name not in TIMES]
    as_values = [[getattr(record, name) for name in names] for record in found]
    assert as_values == [[getattr(record, name) for name in names] for record in expected]


def test_a_row_that_ends_by_itself_drops_what_it_drafted_past_its_end() -> None:
    rows = [SimulatedRow(prompt_len=3, output_len=4, max_new_tokens=20)]
    certain = ParametricAcceptance((1.0,) * 7, row_spread=0, round_spread=0, token_spread=0)
    engine = SimulatedEngine(rows, device=DEVICE, policy=FixedLength(7), acceptance=certain, max_concurrency=1)
    run = engine.run()
    assert run.stats.num_emitted_tokens == 4
    assert run.stats.num_steps == 2
    assert run.stats.num_accepted_tokens == 3


def test_time_is_the_devices_and_the_tail_begins_when_the_queue_is_empty() -> None:
    rows = [SimulatedRow(1, 10, 10) for _ in range(6)]
    never = ParametricAcceptance((0.5,), confidence_noise=None)
    engine = SimulatedEngine(rows, device=DEVICE, policy=FixedLength(0), acceptance=never, max_concurrency=4)
    run = engine.run()
    step_s = 0.010 + 3 * 0.010 / 63
    assert run.stats.num_emitted_tokens == 60
    assert run.full_s == pytest.approx(10 * step_s)
    assert run.tail_s == pytest.approx(10 * (0.010 + 0.010 / 63))
    assert run.num_full_tokens == 40
    assert run.tokens_per_s == pytest.approx(60 / run.wall_s)


def test_shadow_drafts_see_what_would_have_held() -> None:
    """What a row emits is right where its draft was right, also when nothing was verified."""
    seen: list[tuple[list[int], int]] = []

    class Watches(EveryThird):
        def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
            self.drafted = [list(tokens) for tokens in draft.token_ids]
            return VerifyPlan(verify_len=[0] * len(draft.token_ids))

        def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
            assert outcome.emitted is not None
            if self._num_rounds % 3 == 0:
                seen.append((self.drafted[0], outcome.emitted[0][0]))

    rows = [SimulatedRow(1, 300, 300)]
    model = ParametricAcceptance((0.6,) * 4, row_spread=0, round_spread=0, token_spread=0)
    SimulatedEngine(rows, device=DEVICE, policy=Watches(4), acceptance=model, max_concurrency=1).run()
    share = sum(drafted[0] == emitted for drafted, emitted in seen) / len(seen)
    assert share == pytest.approx(0.6, abs=0.15)
