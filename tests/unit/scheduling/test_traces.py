"""Recording rounds of a real engine, keeping them, and judging estimators over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.draft_model import DraftModelDrafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.errors import InputError
from dspark_batch.scheduling.policies import FixedLength, RoundLoad, RoundOutcome
from dspark_batch.scheduling.replay import replay_estimators
from dspark_batch.scheduling.traces import RecordedRound, TraceRecorder, read_trace, rounds_by_row, write_trace
from dspark_batch.tensors import DraftBlock
from dspark_batch.testing.scripted_target import ScriptedModel, ScriptedTarget

GAMMA = 4


@pytest.fixture(scope="module")
def recorded() -> list[RecordedRound]:
    """A draft model that resembles its target, sampled: margins tell where the two agree."""
    target = ScriptedTarget(vocab_size=32, num_kv_tokens=8192, history=1.0)
    drafter = DraftModelDrafter(ScriptedTarget(vocab_size=32, num_kv_tokens=8192), max_draft_tokens=GAMMA)
    policy = TraceRecorder(FixedLength(GAMMA))
    config = EngineConfig(schedule="fixed", max_concurrency=7, share_prefixes=False)
    model = ScriptedModel(target=target, eos_token_ids=frozenset())
    with BatchEngine(model, config, drafter=drafter, policy=policy) as engine:
        for number in range(40):
            sampling = SamplingParams(max_new_tokens=20 + number % 5, temperature=0.5)
            prompt = (number % 31, number % 7, number % 11)
            engine.add(Request(id=str(number), prompt_token_ids=prompt, sampling=sampling))
        while engine.num_unfinished:
            engine.step()
    return policy.rounds


def test_every_round_of_a_run_is_recorded_with_its_margins(recorded: list[RecordedRound]) -> None:
    drafted = 0
    for one in recorded:
        assert one.confidence is None
        for r, offered in enumerate(one.num_offered):
            assert one.num_verified[r] == offered
            assert 0 <= one.num_accepted[r] <= offered
            drafted += offered
            if one.margin is not None:
                assert len(one.margin[r]) == offered
    assert drafted > 500
    rows = rounds_by_row(recorded)
    assert len(rows) == 40
    assert sum(draft.num_offered for drafts in rows.values() for draft in drafts) == drafted


def test_a_trace_is_read_as_it_was_written(recorded: list[RecordedRound], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, recorded)
    assert read_trace(path) == recorded


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is not a"),
        (['{"format": "other"}'], "is not a"),
        (['{"format": "dspark-batch trace", "version": 1, "num_rounds": 2}', "{}"], "cut off"),
        (['{"format": "dspark-batch trace", "version": 1, "num_rounds": 1}', "{}"], "cannot be read"),
        (["no json"], "is not JSON"),
        (["[1]"], "is not an object"),
    ],
)
def test_files_that_are_no_traces_say_why(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=message):
        read_trace(path)
    with pytest.raises(InputError, match="no such file"):
        read_trace(tmp_path / "other.jsonl")


def test_the_recorder_keeps_the_latest_rounds_only() -> None:
    recorder = TraceRecorder(FixedLength(1), max_rounds=10)
    for number in range(25):
        load = RoundLoad(handles=[number], limits=[5], num_prefill_tokens=0, num_queued=0)
        assert recorder.draft_lengths(load) == [1]
        assert recorder.verify_plan(load, DraftBlock(token_ids=[[3]])).verify_len == [1]
        recorder.observe(load, RoundOutcome([1], [0], 2, 0, 0.0, 0.1))
    assert len(recorder.rounds) <= 10
    assert recorder.rounds[-1].handles == (24,)
    assert json.dumps(recorder.rounds[-1].num_offered) == "[1]"


def test_estimators_with_a_signal_rank_better_than_history(recorded: list[RecordedRound]) -> None:
    found = {quality.name: quality for quality in replay_estimators(recorded)}
    assert set(found) == {"history", "margin, logistic"}
    history, margin = found["history"].positions[0].auc, found["margin, logistic"].positions[0].auc
    assert history is not None
    assert margin is not None
    assert margin > max(0.6, history + 0.05)


def synthetic(num_rounds: int, *, boast: float) -> list[RecordedRound]:
    random = np.random.default_rng(7)
    rounds = []
    for _ in range(num_rounds):
        logits = random.normal(1.0, 1.2, (8, GAMMA))
        holds = random.random((8, GAMMA)) < 1 / (1 + np.exp(-logits))
        offered = random.integers(1, GAMMA + 1, 8)
        accepted = np.minimum(np.cumprod(holds, axis=1).sum(1), offered)
        said = 1 / (1 + np.exp(-(logits + boast)))
        confidence = tuple(tuple(row[:n]) for row, n in zip(said.tolist(), offered.tolist(), strict=True))
        counts = tuple(offered.tolist())
        rounds.append(
            RecordedRound(
                handles=tuple(range(8)),
                num_offered=counts,
                num_verified=counts,
                num_accepted=tuple(accepted.tolist()),
                num_step_tokens=8 + sum(counts),
                num_prefill_tokens=0,
                draft_s=0.0,
                step_s=0.0,
                confidence=confidence,
            )
        )
    return rounds


def test_a_boasting_confidence_is_corrected_and_an_honest_one_left_alone() -> None:
    def worst(boast: float) -> dict[str, float]:
        found = replay_estimators(synthetic(600, boast=boast))
        return {e.name: max(q.ece for q in e.positions) for e in found}

    boasting, honest = worst(1.5), worst(0.0)
    assert boasting["confidence as stated"] > 0.1
    assert boasting["confidence, logistic"] < 0.05
    assert honest["confidence as stated"] < 0.05
    assert honest["confidence, logistic"] < 0.05


def test_without_drafts_there_is_nothing_to_judge() -> None:
    assert replay_estimators([]) == ()
