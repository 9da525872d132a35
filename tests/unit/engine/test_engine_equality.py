"""The output of a row is a function of the row: not of drafter, draft length, batch, order or chunking."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.core import Constraint, Request, Result, SamplingParams
from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.ngram import NgramDrafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.engine.config import EngineConfig, ScheduleName
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.sampling.noise import noise_key
from dspark_batch.testing.plain_decoding import decode_plainly
from dspark_batch.testing.scripted_drafters import OracleDrafter, RandomDrafter
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget

VOCAB = 32


def with_constraint(words: set[str], kind: str, ignore_eos: bool, **fields: Any) -> SamplingParams:
    if not words:
        return SamplingParams(ignore_eos=ignore_eos, **fields)
    ordered = sorted(words)
    sources = {
        "choices": json.dumps(ordered),
        "regex": "|".join(ordered),
        "grammar": "start: " + " | ".join(f'"{word}"' for word in ordered),
    }
    return SamplingParams(constraint=Constraint(kind, sources[kind]), **fields)  # type: ignore[arg-type]


samplings = st.builds(
    with_constraint,
    words=st.just(set()) | st.sets(st.text("abcdel", min_size=1, max_size=6), max_size=5),
    kind=st.sampled_from(["choices", "regex", "grammar"]),
    max_new_tokens=st.sampled_from([1, 2, 5, 13, 29]),
    temperature=st.sampled_from([0.0, 0.0, 0.6, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([None, 7]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    seed=st.integers(-3, 3),
    n=st.sampled_from([1, 1, 3]),
    stop=st.sampled_from([(), (), ("ab", "q"), ("e",)]),
    stop_token_ids=st.sampled_from([(), (11,)]),
    ignore_eos=st.booleans(),
)
prompts = st.integers(0, 10**6).flatmap(
    lambda seed: st.sampled_from([1, 2, 3, 7, 19, 41]).map(
        lambda length: tuple(random.Random(seed).randrange(VOCAB) for _ in range(length))
    )
)
workloads = st.lists(st.tuples(prompts, samplings), min_size=1, max_size=9).map(
    lambda rows: [
        Request(id=f"row-{i}", prompt_token_ids=prompt, sampling=sampling) for i, (prompt, sampling) in enumerate(rows)
    ]
)


def scripted(num_kv_tokens: int = 4096) -> ScriptedModel:
    target = ScriptedTarget(vocab_size=VOCAB, max_context=64, num_kv_tokens=num_kv_tokens, contrast=6.0)
    return ScriptedModel(target=target, codec=LetterCodec(VOCAB), eos_token_ids=frozenset({5}))


def expected_results(requests: list[Request]) -> dict[tuple[str, int], tuple[tuple[int, ...], str]]:
    model = scripted()
    return {
        (request.id, sample): decode_plainly(model, request, sample=sample)
        for request in requests
        for sample in range(request.sampling.n)
    }


def drafter_named(name: str, requests: list[Request], gamma: int, taps: tuple[int, ...]) -> Drafter:
    if name == "none":
        return NoDrafter()
    if name == "ngram":
        return NgramDrafter(max_draft_tokens=gamma, min_ngram=1)
    if name == "random":
        return RandomDrafter(vocab_size=VOCAB, max_draft_tokens=gamma, seed=gamma, taps=taps)
    texts = {}
    outputs = expected_results(requests)
    for request in requests:
        for sample in range(request.sampling.n):
            key = noise_key(request.sampling.seed, request.id, sample)
            texts[key] = [*(request.prompt_token_ids or ()), *outputs[request.id, sample][0]]
    error_rate = 0.0 if name == "oracle" else 0.3
    return OracleDrafter(texts, max_draft_tokens=gamma, error_rate=error_rate, taps=taps)


def run_checked(engine: BatchEngine, requests: list[Request]) -> list[Result]:
    """Add everything, step to the end, check integrity after every step."""
    for request in requests:
        engine.add(request)
    out: list[Result] = []
    while engine.num_unfinished:
        out.extend(result for _, result in engine.step())
        engine.check_integrity()
    return out


@given(
    requests=workloads,
    drafter_name=st.sampled_from(["none", "ngram", "random", "oracle", "erring"]),
    gamma=st.sampled_from([1, 2, 3, 7, 11]),
    concurrency=st.sampled_from([1, 3, 7, 32]),
    max_step_tokens=st.sampled_from([16, 17, 37, 2048]),
    num_kv_tokens=st.sampled_from([64, 131, 4096]),
    taps=st.sampled_from([(), (1,), (-1, 3)]),
    share=st.booleans(),
    schedule=st.sampled_from(["auto", "fixed", "threshold", "off"]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=120, deadline=None)
def test_token_ids_equal_plain_decoding_whatever_the_settings(
    requests: list[Request],
    drafter_name: str,
    gamma: int,
    concurrency: int,
    max_step_tokens: int,
    num_kv_tokens: int,
    taps: tuple[int, ...],
    share: bool,
    schedule: ScheduleName,
    order: random.Random,
) -> None:
    model = scripted(num_kv_tokens)
    config = EngineConfig(
        max_concurrency=concurrency,
        max_step_tokens=max_step_tokens,
        max_draft_tokens=gamma,
        poison_dead_kv=True,
        share_prefixes=share,
        schedule=schedule,
    )
    shuffled = order.sample(requests, len(requests))
    with BatchEngine(model, config, drafter=drafter_named(drafter_name, requests, gamma, taps)) as engine:
        results = run_checked(engine, shuffled)
        stats = engine.stats
    assert {(r.id, r.sample): (r.token_ids, r.finish_reason) for r in results} == expected_results(requests)
    assert stats.num_emitted_tokens == sum(r.num_generated_tokens for r in results)
    assert stats.num_accepted_tokens == sum(r.num_accepted_tokens for r in results)
    assert model.target.kv.num_slots == 0
    assert model.target.kv.most_used_tokens <= num_kv_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_always_right_is_accepted_in_full(temperature: float) -> None:
    sampling = SamplingParams(max_new_tokens=31, temperature=temperature, ignore_eos=True)
    requests = [Request(id=f"row-{i}", prompt_token_ids=(i, 2, 3), sampling=sampling) for i in range(5)]
    model = scripted()
    drafter = drafter_named("oracle", requests, 5, ())
    with BatchEngine(model, EngineConfig(max_draft_tokens=5, schedule="fixed"), drafter=drafter) as engine:
        results = list(engine.generate(requests))
    for result in results:
        # One token comes from the prefill, the other 30 in rounds of 6.
        assert (result.num_rounds, result.num_drafted_tokens, result.num_accepted_tokens) == (5, 25, 25)


@pytest.mark.parametrize("drafter_name", ["none", "oracle", "ngram"])
def test_rows_that_share_a_long_prefix_compute_it_once_and_exactly(drafter_name: str) -> None:
    shared = tuple(random.Random(1).randrange(VOCAB) for _ in range(40))
    sampling = SamplingParams(max_new_tokens=9, temperature=0.8)
    requests = [Request(id=f"row-{i}", prompt_token_ids=(*shared, i, i + 1), sampling=sampling) for i in range(11)]
    counts = {}
    for share in (False, True):
        config = EngineConfig(max_concurrency=3, max_step_tokens=19, share_prefixes=share, poison_dead_kv=True)
        drafter = drafter_named(drafter_name, requests, 3, (2,) if drafter_name == "oracle" else ())
        with BatchEngine(scripted(), config, drafter=drafter) as engine:
            results = run_checked(engine, requests)
            counts[share] = engine.stats.num_prefill_tokens
        assert {(r.id, r.sample): (r.token_ids, r.finish_reason) for r in results} == expected_results(requests)
    assert counts[False] == 11 * 42
    assert counts[True] == 40 + 11 * 2


def test_the_samples_of_one_request_share_their_prompt() -> None:
    prompt = tuple(random.Random(2).randrange(VOCAB) for _ in range(50))
    request = Request(id="a", prompt_token_ids=prompt, sampling=SamplingParams(max_new_tokens=8, temperature=1.0, n=7))
    with BatchEngine(scripted(), EngineConfig(max_concurrency=4, poison_dead_kv=True)) as engine:
        results = list(engine.generate([request]))
        assert engine.stats.num_prefill_tokens == 49 + 7
    assert [r.sample for r in results] == list(range(7))
    expected = expected_results([request])
    assert {(r.id, r.sample): (r.token_ids, r.finish_reason) for r in results} == expected
    assert len({r.token_ids for r in results}) > 1
