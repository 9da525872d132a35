"""The drafter that ships for the embedded model: found, small, described, lossless, and worth its while."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.dspark.checkpoint import read_config
from dspark_batch.drafters.dspark.embedded import embedded_drafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.drafter_factory import make_drafter
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.models.loader import LoadedTarget, load_target

MOST_BYTES = 30_000_000
PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "A farmer has 17 sheep and buys 5 more. Then 4 run away. How many sheep are left? Think step by step.",
    "Write a Python function that returns the sum of the even numbers of a list.",
    "Give me a short packing list for a weekend in the mountains.",
    "What is the difference between a frog and a toad?",
)


@pytest.fixture(scope="module")
def loaded() -> LoadedTarget:
    return load_target(EngineConfig(target="smollm2-135m", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def folder(loaded: LoadedTarget) -> Path:
    found = embedded_drafter(loaded.fingerprint)
    assert found is not None, "no drafter ships for the embedded model"
    return found


def decode(loaded: LoadedTarget, *, temperature: float, **engine: object) -> tuple[list[tuple[int, ...]], float]:
    """Token ids of every prompt, and the accepted length, bonus included."""
    config = EngineConfig.model_validate({"target": "smollm2-135m", "max_concurrency": 3, **engine})
    sampling = SamplingParams(max_new_tokens=40, temperature=temperature)
    requests = [Request(id=f"r{i}", prompt=text, sampling=sampling) for i, text in enumerate(PROMPTS)]
    with BatchEngine(loaded, config) as served:
        results = list(served.generate(requests))
    assert not any(result.error for result in results)
    rounds = sum(result.num_rounds for result in results)
    accepted = sum(result.num_accepted_tokens for result in results)
    return [result.token_ids for result in results], 1.0 + accepted / rounds


@pytest.mark.model
def test_auto_takes_it_for_the_embedded_model(loaded: LoadedTarget, folder: Path) -> None:
    drafter = make_drafter(EngineConfig(drafter="auto"), loaded.target, target_fingerprint=loaded.fingerprint)
    assert drafter.name == "dspark"
    assert drafter.max_draft_tokens == read_config(folder).num_draft_tokens


@pytest.mark.model
def test_it_is_small_and_tells_what_it_was_made_from(loaded: LoadedTarget, folder: Path) -> None:
    files = {file.name: file for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in files.values()) < MOST_BYTES
    card = json.loads(files["card.json"].read_text(encoding="utf-8"))
    assert card["target_fingerprint"] == loaded.fingerprint
    assert {"gsm8k", "mbpp", "chat"} <= {entry["name"] for entry in card["acceptance"]}
    config = read_config(folder)
    assert len(config.confidence_temperatures) == len(config.expected_survival) == config.num_draft_tokens
    assert loaded.fingerprint in files["CARD.md"].read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_changes_no_token_and_is_accepted_far_above_chance(loaded: LoadedTarget, temperature: float) -> None:
    plain, _ = decode(loaded, temperature=temperature, drafter="none")
    drafted, accepted_length = decode(loaded, temperature=temperature, drafter="dspark", schedule="fixed")
    assert drafted == plain
    assert accepted_length > 1.5
    scheduled, _ = decode(loaded, temperature=temperature, drafter="auto", schedule="auto")
    assert scheduled == plain
