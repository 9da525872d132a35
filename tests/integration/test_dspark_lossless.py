"""A DSpark drafter in the engine changes no token, whatever its heads, its layout, the batch and the temperature."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_batch.core import Request, Result, SamplingParams
from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.dspark.checkpoint import DrafterWeights
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.drafter_factory import make_drafter
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.errors import ModelError
from dspark_batch.models.loader import LoadedTarget, load_target
from dspark_batch.testing.tiny import save_tiny_checkpoint
from dspark_batch.testing.tiny_drafter import (
    random_drafter,
    save_deepspec_drafter,
    save_speculators_drafter,
    tiny_drafter_config,
)

VOCAB = 41
PROMPT_LENGTHS = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
HEADS = ("vanilla", "gated", "rnn")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    folder = save_tiny_checkpoint(
        tmp_path_factory.mktemp("target"),
        "qwen3",
        tokenizer=False,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return load_target(engine_config(target=str(folder)))


def engine_config(**fields: Any) -> EngineConfig:
    settings = {"schedule": "fixed", **fields}
    return EngineConfig(dtype="float32", device="cpu", kv_cache_gib=0.01, poison_dead_kv=True, threads=1, **settings)


def drafter_weights(markov: str | None = "vanilla", **overrides: Any) -> DrafterWeights:
    """Random, but close enough to the target (its head is shared) for some drafts to be accepted."""
    config = tiny_drafter_config(markov=markov, vocab_size=VOCAB, **overrides)
    return random_drafter(config, scale=0.05)


def requests(temperature: float) -> list[Request]:
    chooser = random.Random(4)
    out = []
    for i in range(36):
        sampling = SamplingParams(
            max_new_tokens=(3, 10, 21, 30)[i % 4],
            temperature=temperature,
            top_k=9 if i % 5 == 2 else None,
            top_p=0.9 if i % 7 == 3 else 1.0,
            repetition_penalty=1.3 if i % 6 == 1 else 1.0,
            seed=i % 3,
        )
        prompt = tuple(chooser.randrange(3, VOCAB) for _ in range(PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)]))
        out.append(Request(id=f"row-{i}", prompt_token_ids=prompt, sampling=sampling))
    return out


def run(
    target: LoadedTarget, temperature: float, *, drafter: Drafter | None = None, num_rows: int = 36, **fields: Any
) -> tuple[dict[str, tuple[int, ...]], list[Result]]:
    with BatchEngine(target, engine_config(**fields), drafter=drafter) as engine:
        tickets = [engine.add(request) for request in requests(temperature)[:num_rows]]
        results: list[Result] = []
        while engine.num_unfinished:
            results.extend(result for _, result in engine.step())
            engine.check_integrity()
    assert len(results) == len(tickets)
    assert all(result.error is None for result in results)
    return {result.id: result.token_ids for result in results}, results


@pytest.fixture(scope="module")
def plain(target: LoadedTarget) -> dict[float, dict[str, tuple[int, ...]]]:
    return {t: run(target, t, drafter=None, schedule="off", max_concurrency=7)[0] for t in (0.0, 0.8)}


def drafter_from(
    target: LoadedTarget, folder: Path, *, verification: str = "coupled", fingerprint: str | None = None
) -> Any:
    config = engine_config(drafter="dspark", drafter_path=str(folder), verification=verification)
    return make_drafter(config, target.target, target_fingerprint=fingerprint or target.fingerprint)


def assert_everything_was_released(drafter: Any) -> None:
    drafter.check_integrity()
    assert drafter.cache.num_rows == 0
    assert drafter.cache.num_free_tokens == drafter.cache.num_total_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("concurrency", [1, 7, 32])
@pytest.mark.parametrize("markov", HEADS)
def test_token_ids_are_those_of_plain_decoding(
    target: LoadedTarget,
    plain: dict[float, dict[str, tuple[int, ...]]],
    tmp_path: Path,
    markov: str,
    concurrency: int,
    temperature: float,
) -> None:
    drafter = drafter_from(target, save_deepspec_drafter(tmp_path, drafter_weights(markov)))
    num_rows = 8 if concurrency == 1 else 36
    outputs, results = run(target, temperature, drafter=drafter, num_rows=num_rows, max_concurrency=concurrency)
    assert outputs == {row: tokens for row, tokens in plain[temperature].items() if row in outputs}
    assert sum(result.num_accepted_tokens for result in results) > 0
    assert_everything_was_released(drafter)


@pytest.mark.parametrize(
    "overrides",
    [
        {"draft_vocab_size": 17},
        {"markov": None, "has_confidence": False, "sample_from_anchor": False},
        {"windows": (None, 7), "causal_windows": True, "markov": "rnn"},
    ],
    ids=["reduced vocabulary", "dflash", "windows"],
)
def test_the_other_layout_and_its_features_change_no_token_either(
    target: LoadedTarget,
    plain: dict[float, dict[str, tuple[int, ...]]],
    tmp_path: Path,
    overrides: dict[str, Any],
) -> None:
    folder = save_speculators_drafter(tmp_path, drafter_weights(**overrides))
    for temperature in (0.0, 0.8):
        drafter = drafter_from(target, folder)
        outputs, results = run(
            target, temperature, drafter=drafter, max_concurrency=7, max_draft_tokens=3, max_step_tokens=37
        )
        assert outputs == plain[temperature]
        assert sum(result.num_drafted_tokens for result in results) > 0
        assert_everything_was_released(drafter)


def test_sharing_noise_is_accepted_more_often_than_drafting_from_a_stream_of_its_own(
    target: LoadedTarget, tmp_path: Path
) -> None:
    folder = save_deepspec_drafter(tmp_path, drafter_weights())
    accepted = {}
    for verification in ("coupled", "token"):
        drafter = drafter_from(target, folder, verification=verification)
        results = run(target, 0.8, drafter=drafter, max_concurrency=32)[1]
        accepted[verification] = sum(result.num_accepted_tokens for result in results)
    assert accepted["coupled"] > 2 * accepted["token"], "under coupled verification with another noise than its own"


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("draft_vocab_size", [VOCAB, 17])
def test_rejection_modes_run_and_are_greedy_at_temperature_zero(
    target: LoadedTarget,
    plain: dict[float, dict[str, tuple[int, ...]]],
    tmp_path: Path,
    verification: Any,
    draft_vocab_size: int,
) -> None:
    folder = save_deepspec_drafter(tmp_path, drafter_weights("gated", draft_vocab_size=draft_vocab_size))
    for temperature in (0.0, 0.8):
        drafter = drafter_from(target, folder, verification=verification)
        outputs, results = run(target, temperature, drafter=drafter, verification=verification, max_concurrency=7)
        if temperature == 0:
            assert outputs == plain[0.0]
        assert sum(result.num_accepted_tokens for result in results) > 0
        assert_everything_was_released(drafter)


def test_rows_without_context_memory_are_decoded_plainly(
    target: LoadedTarget, plain: dict[float, dict[str, tuple[int, ...]]]
) -> None:
    from dspark_batch.drafters.dspark.drafter import DSparkDrafter
    from dspark_batch.models.draft_parts import RunnerParts

    parts = RunnerParts(target.target, fingerprint=target.fingerprint)
    drafter = DSparkDrafter(drafter_weights(), parts, num_context_tokens=90)
    outputs, results = run(target, 0.8, drafter=drafter, max_concurrency=32)
    assert outputs == plain[0.8]
    drafted = [result.num_drafted_tokens for result in results if result.num_generated_tokens > 2]
    assert min(drafted) == 0
    assert max(drafted) > 0
    assert_everything_was_released(drafter)


def test_rows_that_share_a_prefix_draft_as_if_they_did_not(target: LoadedTarget, tmp_path: Path) -> None:
    folder = save_deepspec_drafter(tmp_path, drafter_weights("rnn"))
    shared = tuple(random.Random(1).randrange(3, VOCAB) for _ in range(40))
    sampling = SamplingParams(max_new_tokens=15, temperature=0.8)
    batch = [Request(id=f"row-{i}", prompt_token_ids=(*shared, 3 + i), sampling=sampling) for i in range(9)]
    seen = []
    for share in (False, True):
        drafter = drafter_from(target, folder)
        config = engine_config(share_prefixes=share, max_concurrency=4)
        with BatchEngine(target, config, drafter=drafter) as engine:
            results = list(engine.generate(batch))
            seen.append([(r.token_ids, r.num_drafted_tokens, r.num_accepted_tokens) for r in results])
            assert (engine.stats.num_shared_prefix_tokens > 0) == share
        assert_everything_was_released(drafter)
    assert seen[0] == seen[1]


def test_a_drafter_of_another_target_is_refused_when_the_engine_is_built(target: LoadedTarget, tmp_path: Path) -> None:
    weights = drafter_weights(target_fingerprint="of-another", taps=(0, 2))
    folder = save_deepspec_drafter(tmp_path, weights)
    config = engine_config(drafter="dspark", drafter_path=str(folder))
    with pytest.raises(ModelError, match=r"target_fingerprint is of-another.*tapped layers \[2\]"):
        BatchEngine(target, config)


def test_auto_takes_the_drafter_that_ships_for_the_target_and_suffix_for_others(
    target: LoadedTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_deepspec_drafter(tmp_path, drafter_weights(target_fingerprint=target.fingerprint))
    shipped = {target.fingerprint: folder}
    monkeypatch.setattr("dspark_batch.engine.drafter_factory.embedded_drafter", shipped.get)
    for drafter in ("auto", "dspark"):
        made = make_drafter(engine_config(drafter=drafter), target.target, target_fingerprint=target.fingerprint)
        assert made.name == "dspark"
    other = make_drafter(engine_config(drafter="auto"), target.target, target_fingerprint="another")
    assert other.name == "suffix"
