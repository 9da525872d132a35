"""Top-2 margins: against a slow look at sorted scores, with and without noise, and as drafters hand them out."""

from __future__ import annotations

import pytest
import torch

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.draft_model import DraftModelDrafter
from dspark_batch.drafters.margins import MAX_MARGIN, shared_noise_margin, top2_margin
from dspark_batch.engine.config import EngineConfig, VerificationMode
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.sampling import noise
from dspark_batch.scheduling.policies import FixedLength
from dspark_batch.scheduling.traces import TraceRecorder
from dspark_batch.testing.scripted_target import ScriptedModel, ScriptedTarget

SAMPLING = (SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=1.5))


def test_a_margin_is_the_lead_over_the_second_best() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.5], [0.0, -torch.inf, -torch.inf], [4.0, 4.0, 1.0]])
    assert top2_margin(scores).tolist() == [0.5, MAX_MARGIN, 0.0]
    assert top2_margin(scores[:, :1]).tolist() == [MAX_MARGIN] * 3


def test_with_shared_noise_it_is_the_lead_of_what_verification_maximises() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, 29, generator=generator)
    keys, positions = [noise.noise_key(1, str(i), 0) for i in range(3)], [4, 9, 2]
    found = shared_noise_margin(logits.clone(), SAMPLING, keys=keys, positions=positions)
    for i, sampling in enumerate(SAMPLING):
        scores = logits[i].double()
        if not sampling.is_greedy:
            at = torch.tensor([keys[i]]), torch.tensor([positions[i]])
            scores = scores / sampling.temperature + noise.gumbel(*at, torch.arange(29)[None])[0]
        best, second = scores.sort(descending=True).values[:2].tolist()
        assert found[i].item() == pytest.approx(best - second, rel=1e-4)


@pytest.mark.parametrize("mode", ["coupled", "token"])
def test_a_draft_model_hands_out_a_margin_for_every_token(mode: VerificationMode) -> None:
    drafter = DraftModelDrafter(ScriptedTarget(vocab_size=32), coupled=mode == "coupled", max_draft_tokens=3)
    recorder = TraceRecorder(FixedLength(3))
    config = EngineConfig(verification=mode, schedule="fixed", max_concurrency=3)
    model = ScriptedModel(target=ScriptedTarget(vocab_size=32), eos_token_ids=frozenset())
    with BatchEngine(model, config, drafter=drafter, policy=recorder) as engine:
        for number in range(6):
            sampling = SamplingParams(max_new_tokens=9 + number, temperature=float(number % 2))
            engine.add(Request(id=str(number), prompt_token_ids=(number, 3), sampling=sampling))
        while engine.num_unfinished:
            engine.step()
    for recorded in recorder.rounds:
        if any(recorded.num_offered):
            assert recorded.margin is not None
            assert tuple(map(len, recorded.margin)) == recorded.num_offered
            assert all(value >= 0 for row in recorded.margin for value in row)
