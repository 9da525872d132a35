"""The rounds that a reference implementation recorded for a DeepSpec checkpoint, replayed by the engine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark_batch.core import Request, Result, SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.dspark.drafter import DSparkDrafter
from dspark_batch.drafters.dspark.model import Drafted, DrawSlot
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.models.draft_parts import RunnerParts
from dspark_batch.models.loader import LoadedTarget, load_target
from dspark_batch.tensors import DraftBlock

NAME = "deepspec_dspark_vanilla"
ROOT = Path(os.environ.get("DSPARK_BATCH_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures")) / NAME
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="the recorded rounds are not at hand")
NUM_TOKENS = 48
TOLERANCE = 1e-4


@dataclass
class Round:
    start: int
    anchor: int
    draft: list[int]
    logits: Tensor
    confidence: Tensor


@dataclass
class Recorder:
    """Watches a drafter: the logits it draws from, and what it hands to the engine."""

    drafter: DSparkDrafter
    rounds: dict[int, list[Round]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._draft, self._propose = self.drafter.model.draft, self.drafter.propose
        self.drafter.model.draft = self.draft  # type: ignore[method-assign]
        self.drafter.propose = self.propose  # type: ignore[method-assign]

    def draft(self, hidden: Tensor, anchors: Tensor, draw: DrawSlot) -> Drafted:
        logits: list[Tensor] = []

        def watched(values: Tensor, slot: int) -> Tensor:
            logits.append(values.clone())
            return draw(values, slot)

        self.drafted = self._draft(hidden, anchors, watched)
        self.logits = torch.stack(logits, dim=1)
        return self.drafted

    def propose(self, rows: Any, max_tokens: Any) -> DraftBlock:
        # The last rounds of a row may ask for less; the full block is drafted all the same.
        block = self._propose(rows, max_tokens)
        drafting: list[DraftRow] = [row for row, limit in zip(rows, max_tokens, strict=True) if limit]
        assert self.drafted.confidence_logits is not None
        for r, row in enumerate(drafting):
            self.rounds.setdefault(row.handle, []).append(
                Round(
                    start=len(row.token_ids) - 1,
                    anchor=row.token_ids[-1],
                    draft=self.drafted.token_ids[r].tolist(),
                    logits=self.logits[r],
                    confidence=self.drafted.confidence_logits[r],
                )
            )
        return block


@pytest.fixture(scope="module")
def target() -> LoadedTarget:
    return load_target(engine_config(6))


def engine_config(concurrency: int) -> EngineConfig:
    return EngineConfig(
        target=str(ROOT / "target"),
        dtype="float32",
        device="cpu",
        drafter="dspark",
        drafter_path=str(ROOT / "draft"),
        max_concurrency=concurrency,
        kv_cache_gib=0.01,
        poison_dead_kv=True,
        schedule="fixed",
    )


def run(target: LoadedTarget, concurrency: int) -> tuple[list[Result], Recorder]:
    prompts = json.loads((ROOT / "rounds.json").read_text())
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS + 6, ignore_eos=True)
    requests = [
        Request(id=str(i), prompt_token_ids=tuple(entry["prompt"]), sampling=sampling)
        for i, entry in enumerate(prompts)
    ]
    parts = RunnerParts(target.target, fingerprint=target.fingerprint)
    recorder = Recorder(DSparkDrafter.load(ROOT / "draft", parts, shared_noise=True))
    with BatchEngine(target, engine_config(concurrency), drafter=recorder.drafter) as engine:
        results = list(engine.generate(requests))
        engine.check_integrity()
    assert recorder.drafter.cache.num_rows == 0
    return results, recorder


@pytest.mark.parametrize("concurrency", [1, 6])
def test_recorded_rounds_agree_one_by_one_and_in_one_ragged_batch(target: LoadedTarget, concurrency: int) -> None:
    expected = json.loads((ROOT / "rounds.json").read_text())
    tensors = load_file(ROOT / "rounds.safetensors")
    results, recorder = run(target, concurrency)
    assert len(recorder.rounds) == len(expected)
    by_prompt = [recorder.rounds[handle] for handle in sorted(recorder.rounds)]
    for p, (entry, rounds, result) in enumerate(zip(expected, by_prompt, results, strict=True)):
        assert list(result.token_ids[:NUM_TOKENS]) == entry["output"]
        assert len(rounds) >= len(entry["rounds"])
        for j, (want, got) in enumerate(zip(entry["rounds"], rounds, strict=False)):
            assert (got.start, got.anchor, got.draft) == (want["start"], want["anchor"], want["draft"])
            after = [*entry["prompt"], *result.token_ids]
            end = want["start"] + want["accepted"] + 1
            assert after[want["start"] + 1 : end] == want["draft"][: want["accepted"]]
            assert after[end] == want["next_token"]
            if j + 1 < len(rounds):
                assert rounds[j + 1].start == end
            torch.testing.assert_close(got.logits, tensors[f"p{p}.r{j}.draft_logits"], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(got.confidence, tensors[f"p{p}.r{j}.confidence_logits"], atol=TOLERANCE, rtol=0)


def test_the_factory_loads_the_published_layout(target: LoadedTarget) -> None:
    with BatchEngine(target, engine_config(2)) as engine:
        request = Request(id="a", prompt_token_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=20))
        [result] = engine.generate([request])
    assert result.num_drafted_tokens > 0
