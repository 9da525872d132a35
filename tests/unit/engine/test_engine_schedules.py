"""Coupled token ids do not depend on the schedule: every policy, and policies that choose at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.suffix import SuffixConfig, SuffixDrafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.metrics import PlanReason
from dspark_batch.sampling.noise import noise_key
from dspark_batch.scheduling.auto import AutoLength
from dspark_batch.scheduling.cost import StepCost
from dspark_batch.scheduling.cost_table import CostTable
from dspark_batch.scheduling.policies import FixedLength, LengthPolicy, RoundLoad, RoundOutcome, ThresholdLength
from dspark_batch.tensors import DraftBlock, VerifyPlan
from dspark_batch.testing.plain_decoding import decode_plainly
from dspark_batch.testing.scripted_drafters import OracleDrafter
from dspark_batch.testing.scripted_target import ScriptedModel, ScriptedTarget

VOCAB = 24


class RandomLengths:
    """Asks for anything, verifies anything."""

    reason = PlanReason.DRAFTED

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        return [self._random.randint(0, max(0, limit)) for limit in load.limits]

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        return VerifyPlan(verify_len=[self._random.randint(0, len(tokens)) for tokens in draft.token_ids])

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        assert outcome.emitted is not None
        for accepted, emitted in zip(outcome.num_accepted, outcome.emitted, strict=True):
            assert len(emitted) <= accepted + 1


class SayingDrafter(OracleDrafter):
    """An erring oracle that says something about its tokens: the same for right and wrong ones."""

    def propose(self, rows: Sequence[object], max_tokens: Sequence[int]) -> DraftBlock:  # type: ignore[override]
        block = super().propose(rows, max_tokens)  # type: ignore[arg-type]
        return DraftBlock(token_ids=block.token_ids, confidence=[[0.8] * len(tokens) for tokens in block.token_ids])


def policy_named(name: str, seed: int) -> LengthPolicy:
    if name == "random":
        return RandomLengths(seed)
    if name == "fixed":
        return FixedLength(1 + seed % 5)
    if name == "threshold":
        return ThresholdLength(5, survival=0.6)
    # Real step times against this table are noise: the schedule does something else in every run.
    slope = 1e-6 * 10 ** (seed % 4)
    table = CostTable.from_function(lambda t, r, c: 1e-5 + slope * t, rows=(1, 4, 16), tokens_per_row=(1, 2, 4, 8))
    return AutoLength(max_draft_tokens=5, cost=StepCost(table), may_use_draft=name == "auto")


def model() -> ScriptedModel:
    return ScriptedModel(
        target=ScriptedTarget(vocab_size=VOCAB, max_context=64, contrast=6.0), eos_token_ids=frozenset({5})
    )


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            id=f"row-{i}",
            prompt_token_ids=tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 7, 19]))),
            sampling=SamplingParams(
                max_new_tokens=rng.choice([1, 5, 13, 29]),
                temperature=rng.choice([0.0, 0.0, 0.8]),
                seed=seed,
                ignore_eos=rng.random() < 0.7,
            ),
        )
        for i in range(9)
    ]


@given(
    name=st.sampled_from(["random", "random", "auto", "auto", "auto, causal", "fixed", "threshold"]),
    drafter_name=st.sampled_from(["suffix", "oracle", "saying"]),
    seed=st.integers(0, 40),
    concurrency=st.sampled_from([1, 3, 7, 32]),
    max_step_tokens=st.sampled_from([16, 37, 2048]),
)
@settings(max_examples=60, deadline=None)
def test_token_ids_equal_plain_decoding_under_every_schedule(
    name: str, drafter_name: str, seed: int, concurrency: int, max_step_tokens: int
) -> None:
    rows = requests(seed)
    expected = {request.id: decode_plainly(model(), request) for request in rows}
    config = EngineConfig(max_concurrency=concurrency, max_step_tokens=max_step_tokens, poison_dead_kv=True)
    drafter: Drafter
    if drafter_name == "suffix":
        drafter = SuffixDrafter(SuffixConfig(max_draft_tokens=5, orders=(1, 2, 4)))
    else:
        texts = {
            noise_key(seed, request.id, 0): [*(request.prompt_token_ids or ()), *expected[request.id][0]]
            for request in rows
        }
        kind = OracleDrafter if drafter_name == "oracle" else SayingDrafter
        drafter = kind(texts, max_draft_tokens=5, error_rate=0.3)
    with BatchEngine(model(), config, drafter=drafter, policy=policy_named(name, seed)) as engine:
        for request in rows:
            engine.add(request)
        results = []
        while engine.num_unfinished:
            results.extend(result for _, result in engine.step())
            engine.check_integrity()
        stats = engine.stats
    assert {r.id: (r.token_ids, r.finish_reason) for r in results} == expected
    assert sum(stats.num_steps_by_reason.values()) <= stats.num_steps


def test_the_step_record_says_what_was_chosen_and_why() -> None:
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    request = Request(id="a", prompt_token_ids=(1, 2, 3), sampling=sampling)
    for policy, reason in ((FixedLength(3), PlanReason.FIXED), (ThresholdLength(3), PlanReason.THRESHOLD)):
        with BatchEngine(model(), EngineConfig(), drafter=SuffixDrafter(), policy=policy) as engine:
            list(engine.generate([request]))
            assert set(engine.stats.num_steps_by_reason) == {reason}
            assert engine.stats.last is not None
            assert engine.stats.last.reason is reason
    with BatchEngine(model(), EngineConfig(schedule="off")) as engine:
        list(engine.generate([request]))
        assert engine.stats.num_steps_by_reason == {}


def test_a_target_that_cannot_be_measured_is_drafted_for_in_full(caplog: pytest.LogCaptureFixture) -> None:
    request = Request(id="a", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_new_tokens=8, ignore_eos=True))
    with BatchEngine(model(), EngineConfig(schedule="auto", drafter="suffix")) as engine:
        list(engine.generate([request]))
        assert set(engine.stats.num_steps_by_reason) == {PlanReason.NO_TABLE, PlanReason.AT_LIMIT}
    assert sum("no cost table" in message for message in caplog.messages) == 1
