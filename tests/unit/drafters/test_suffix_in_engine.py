"""The suffix drafter inside the engine: the outputs of plain decoding in every mode that promises them."""

from __future__ import annotations

import random

import pytest

from dspark_batch.core import Request, Result, SamplingParams
from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.drafters.suffix import SuffixConfig, SuffixDrafter
from dspark_batch.engine.config import EngineConfig, VerificationMode
from dspark_batch.engine.drafter_factory import make_drafter
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget


def scripted() -> ScriptedModel:
    target = ScriptedTarget(vocab_size=24, max_context=128, num_kv_tokens=2048, contrast=8.0)
    return ScriptedModel(target=target, codec=LetterCodec(), eos_token_ids=frozenset({5}))


def requests(*, temperature: float | None = None) -> list[Request]:
    rng = random.Random(9)
    out = []
    for i in range(19):
        prompt = (*(rng.randrange(24) for _ in range((5 * i) % 23 + 1)), 7, 8, 9)
        t = (0.0, 0.8, 1.3)[i % 3] if temperature is None else temperature
        out.append(
            Request(id=f"r{i}", prompt_token_ids=prompt, sampling=SamplingParams(max_new_tokens=31, temperature=t))
        )
    return out


def run(drafter: Drafter, jobs: list[Request], *, mode: VerificationMode = "coupled") -> dict[str, Result]:
    config = EngineConfig(verification=mode, schedule="fixed", max_concurrency=4, poison_dead_kv=True)
    with BatchEngine(scripted(), config, drafter=drafter) as engine:
        for request in jobs:
            engine.add(request)
        results: dict[str, Result] = {}
        while engine.num_unfinished:
            results.update((result.id, result) for _, result in engine.step())
            engine.check_integrity()
    return results


@pytest.mark.parametrize(
    "config",
    [SuffixConfig(), SuffixConfig(max_draft_tokens=3, orders=(1, 3), min_survival=0.0), SuffixConfig(global_tokens=64)],
    ids=["default", "eager", "small window"],
)
def test_coupled_outputs_are_those_of_plain_decoding(config: SuffixConfig) -> None:
    plain = run(NoDrafter(), requests())
    drafted = run(SuffixDrafter(config), requests())
    assert {i: r.token_ids for i, r in drafted.items()} == {i: r.token_ids for i, r in plain.items()}
    assert sum(r.num_accepted_tokens for r in drafted.values()) > 0


@pytest.mark.parametrize("mode", ["token", "block"])
def test_greedy_outputs_are_those_of_plain_decoding_in_rejection_modes(mode: VerificationMode) -> None:
    plain = run(NoDrafter(), requests(temperature=0.0))
    drafted = run(SuffixDrafter(), requests(temperature=0.0), mode=mode)
    assert {i: r.token_ids for i, r in drafted.items()} == {i: r.token_ids for i, r in plain.items()}


@pytest.mark.parametrize("mode", ["token", "block"])
def test_rejection_modes_repeat_themselves_when_the_job_is_repeated(mode: VerificationMode) -> None:
    first, second = (run(SuffixDrafter(), requests(), mode=mode) for _ in range(2))
    assert {i: r.token_ids for i, r in first.items()} == {i: r.token_ids for i, r in second.items()}


def test_the_engines_settings_name_it_and_set_its_length() -> None:
    config = EngineConfig(drafter="suffix", max_draft_tokens=5)
    drafter = make_drafter(config, scripted().target, target_fingerprint="")
    assert isinstance(drafter, SuffixDrafter)
    assert drafter.max_draft_tokens == 5
