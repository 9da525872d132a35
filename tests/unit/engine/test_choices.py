"""The probabilities of choices: their law against enumeration, in the engine against one plain pass for each choice."""

from __future__ import annotations

import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.core import Constraint, ErrorCode, FinishReason, Request, Result, SamplingParams
from dspark_batch.drafters.base import Drafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.engine.choices import ChoiceTree
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.models.native import NativeDecoder
from dspark_batch.testing.plain_decoding import decode_plainly
from dspark_batch.testing.scripted_drafters import RandomDrafter
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget
from dspark_batch.testing.tiny import load_tiny, save_tiny_checkpoint

VOCAB = 32
TOY_VOCAB = 3

words = st.lists(st.text("abcdel", min_size=1, max_size=6), min_size=1, max_size=6, unique=True)


def scoring(*choices: str, **fields: Any) -> SamplingParams:
    return SamplingParams(constraint=Constraint("choices", json.dumps(choices)), score_choices=True, **fields)


def scripted(**settings: Any) -> ScriptedModel:
    target = ScriptedTarget(vocab_size=VOCAB, max_context=64, contrast=6.0, **settings)
    return ScriptedModel(target=target, codec=LetterCodec(VOCAB), eos_token_ids=frozenset({5}))


def run(requests: list[Request], served: ScriptedModel | None = None, **settings: Any) -> dict[str, Result]:
    config = EngineConfig(drafter="none", schedule="off", poison_dead_kv=True, **settings)
    with BatchEngine(served or scripted(), config) as engine:
        return {result.id: result for result in engine.generate(requests)}


def law(toy: random.Random) -> dict[tuple[int, ...], list[float]]:
    """The next token's distribution after every prefix of up to two tokens."""
    tables = {}
    for length in range(3):
        for prefix in product(range(TOY_VOCAB), repeat=length):
            weights = [toy.random() ** 3 + 1e-4 for _ in range(TOY_VOCAB)]
            tables[prefix] = [weight / sum(weights) for weight in weights]
    return tables


@given(
    choices=st.lists(
        st.lists(st.integers(0, TOY_VOCAB - 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=9, unique=True
    ),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_the_scores_are_those_of_all_answers_counted_one_by_one(choices: list[tuple[int, ...]], seed: int) -> None:
    """An answer counts for the longest choice that it begins with."""
    tables = law(random.Random(seed))
    expected = dict.fromkeys(choices, 0.0)
    for answer in product(range(TOY_VOCAB), repeat=3):
        begun = [choice for choice in choices if answer[: len(choice)] == choice]
        if begun:
            expected[max(begun, key=len)] += math.prod(tables[answer[:at]][answer[at]] for at in range(3))
    tree = ChoiceTree([str(choice) for choice in choices], choices)
    logprobs = np.full(tree.num_nodes, np.nan)
    for path in tree.paths:
        for place, token, node in zip(path.places, path.tokens, path.nodes, strict=True):
            assert np.isnan(logprobs[node]), "a node is read twice"
            logprobs[node] = math.log(tables[path.draft[:place]][token])
    scores = tree.scores(logprobs)
    total = sum(expected.values())
    assert scores.coverage == pytest.approx(total)
    assert list(scores.probs.values()) == pytest.approx([expected[choice] / total for choice in choices], abs=1e-12)


def test_choices_that_begin_alike_are_computed_together() -> None:
    tree = ChoiceTree(["ab", "ac", "a", "d", "abx"], [(1, 2), (1, 3), (1,), (4,), (1, 2, 9)])
    assert [path.draft for path in tree.paths] == [(1, 2)]
    apart = ChoiceTree(["ab", "cd"], [(1, 2), (3, 4)])
    assert [path.draft for path in apart.paths] == [(1,), (3,)]


def plain_scores(model: ScriptedModel, prompt: tuple[int, ...], choices: list[str]) -> tuple[dict[str, float], float]:
    """By one pass over prompt and choice for each choice, and subtraction by the texts' own prefixes."""
    begins = {}
    for choice in choices:
        tokens = LetterCodec(VOCAB).encode(choice)
        steps = [
            model.target.expected_logits([*prompt, *tokens[:at]]).double().log_softmax(-1)[token].item()
            for at, token in enumerate(tokens)
        ]
        begins[choice] = math.exp(sum(steps))
    alone = dict(begins)
    for choice in sorted(choices, key=len, reverse=True):
        longer = [other for other in choices if other != choice and other.startswith(choice)]
        alone[choice] = begins[choice] - sum(alone[other] for other in longer)
    total = sum(alone.values())
    return {choice: p / total for choice, p in alone.items()}, total


@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 2, 7, 19, 41]), words), min_size=1, max_size=9),
    concurrency=st.sampled_from([1, 3, 16]),
    max_step_tokens=st.sampled_from([16, 17, 37, 2048]),
    num_kv_tokens=st.sampled_from([64, 131, 4096]),
    taps=st.sampled_from([(), (1,)]),
    share=st.booleans(),
    num_logit_positions=st.sampled_from([1, 5, 2048]),
)
@settings(max_examples=50, deadline=None)
def test_scores_equal_one_pass_for_each_choice_whatever_decodes_beside_them(
    rows: list[tuple[int, list[str]]],
    concurrency: int,
    max_step_tokens: int,
    num_kv_tokens: int,
    taps: tuple[int, ...],
    share: bool,
    num_logit_positions: int,
) -> None:
    alphabet = random.Random(3)
    common = [alphabet.randrange(VOCAB) for _ in range(41)]
    requests = []
    for number, (length, choices) in enumerate(rows):
        prompt = (*common[: length - 1], alphabet.randrange(VOCAB))
        requests.append(Request(id=f"s{number}", prompt_token_ids=prompt, sampling=scoring(*choices)))
        free = SamplingParams(max_new_tokens=9, temperature=0.8, n=2)
        requests.append(Request(id=f"g{number}", prompt_token_ids=prompt, sampling=free))
    model = scripted(num_kv_tokens=num_kv_tokens)
    drafter: Drafter = RandomDrafter(vocab_size=VOCAB, max_draft_tokens=3, seed=1, taps=taps)
    config = EngineConfig(
        max_concurrency=concurrency, max_step_tokens=max_step_tokens, share_prefixes=share, poison_dead_kv=True
    )
    logit_elements = patch("dspark_batch.engine.step._LOGIT_ELEMENTS", num_logit_positions * VOCAB)
    with logit_elements, BatchEngine(model, config, drafter=drafter) as engine:
        tickets = {engine.add(request): request for request in requests}
        results = []
        while engine.num_unfinished:
            results += [(tickets[ticket], result) for ticket, result in engine.step()]
            engine.check_integrity()
    assert model.target.kv.num_slots == 0
    assert len(results) == 3 * len(rows)
    for request, result in results:
        if not request.sampling.score_choices:
            assert (result.token_ids, result.finish_reason) == decode_plainly(model, request, sample=result.sample)
            continue
        assert request.prompt_token_ids is not None
        assert request.sampling.constraint is not None
        choices = json.loads(request.sampling.constraint.source)
        probs, coverage = plain_scores(model, request.prompt_token_ids, choices)
        assert result.choice_scores is not None
        assert result.choice_scores.probs == pytest.approx(probs, abs=1e-5)
        assert result.choice_scores.coverage == pytest.approx(coverage, rel=1e-4)
        assert result.choice_scores == run([request])[request.id].choice_scores


def test_the_text_is_the_most_probable_choice_and_a_result_says_what_it_cost() -> None:
    result = run([Request(id="r", prompt_token_ids=(3, 1, 4), sampling=scoring("abc", "ade", "l", "abd"))])["r"]
    assert result.choice_scores is not None
    assert result.text == max(result.choice_scores.probs, key=result.choice_scores.probs.__getitem__)
    assert result.token_ids == tuple(LetterCodec(VOCAB).encode(result.text))
    assert result.finish_reason is FinishReason.STOP
    assert (result.num_prompt_tokens, result.num_generated_tokens) == (3, len(result.token_ids))
    assert (result.num_rounds, result.num_drafted_tokens, result.logprobs) == (0, 0, None)


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (Request(id="x", prompt_token_ids=(1,) * 60, sampling=scoring("a", "abcde")), "prompt_too_long", "the 5 of"),
        (Request(id="x", prompt_token_ids=(1,), sampling=scoring("a" * 17)), "invalid_sampling", "17 tokens"),
    ],
)
def test_choices_that_cannot_be_scored_fail_their_row_alone(request_: Request, code: str, said: str) -> None:
    good = Request(id="good", prompt_token_ids=(1,) * 60, sampling=scoring("abcd", "b"))
    results = run([request_, good], max_step_tokens=16)
    error = results["x"].error
    assert error is not None
    assert error.code is ErrorCode(code)
    assert said in error.message
    assert results["good"].error is None


def test_choices_with_the_same_tokens_are_refused() -> None:
    class Shouting(LetterCodec):
        def encode_plain(self, text: str) -> list[int]:
            return super().encode_plain(text.lower())

    served = ScriptedModel(target=ScriptedTarget(vocab_size=VOCAB), codec=Shouting(VOCAB))
    error = run([Request(id="x", prompt_token_ids=(1,), sampling=scoring("yes", "YES"))], served)["x"].error
    assert error is not None
    assert "'yes' and 'YES' are the same tokens" in error.message


def test_logits_that_are_no_numbers_fail_their_row_alone() -> None:
    bad = Request(id="bad", prompt_token_ids=(7,), sampling=scoring("a", "b"))
    good = Request(id="good", prompt_token_ids=(8,), sampling=scoring("a", "b"))
    results = run([bad, good], scripted(poisoned_token=7))
    assert results["bad"].error is not None
    assert results["bad"].error.code is ErrorCode.NON_FINITE_LOGITS
    assert results["good"].error is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 0.5}, "sampling.temperature must be 0"),
        ({"n": 2}, "sampling.n must be 1"),
        ({"logprobs": 1}, "sampling.logprobs must be None"),
        ({"stop": ("a",)}, "sampling.stop must be empty"),
        ({"stop_token_ids": (3,)}, "sampling.stop_token_ids must be empty"),
        ({"repetition_penalty": 1.1}, "sampling.repetition_penalty must be 1"),
    ],
)
def test_settings_of_a_draw_are_refused_where_nothing_is_drawn(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        scoring("a", **fields)
    with pytest.raises(ValueError, match=r"sampling\.constraint must be choices"):
        SamplingParams(score_choices=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_models_scores_are_those_of_transformers_and_do_not_depend_on_the_batch(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny_checkpoint(tmp_path / "tiny", num_attention_heads=3, num_key_value_heads=1)
    loaded = load_tiny(folder, dtype=dtype)
    choices = ["good", "goods", "bad", "b", "so so"]
    prompts = ["x", "the same beginning of all that follows, then one", "the same beginning of all that follows, two"]
    requests = [Request(id=text, prompt=text, sampling=scoring(*choices)) for text in prompts]
    found = []
    for concurrency, max_step_tokens in ((1, 256), (5, 64), (3, 17)):
        config = EngineConfig(max_concurrency=concurrency, max_step_tokens=max_step_tokens, poison_dead_kv=True)
        with BatchEngine(loaded, config, drafter=NoDrafter()) as engine:
            found.append({result.id: result.choice_scores for result in engine.generate(requests)})
    if load_kernels() is not None:
        assert isinstance(loaded.target.decoder, NativeDecoder)
        assert found[0] == found[1] == found[2]
    if dtype == "bfloat16":
        return
    assert loaded.codec is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text in prompts:
        begins = {}
        for choice in choices:
            prompt, tokens = loaded.codec.encode(text), loaded.codec.encode_plain(choice)
            with torch.no_grad():
                logprobs = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            begins[choice] = math.exp(logprobs[range(len(tokens)), tokens].sum().item())
        begins["good"] -= begins["goods"]
        begins["b"] -= begins["bad"]
        scores = found[0][text]
        assert scores is not None
        total = sum(begins.values())
        assert scores.coverage == pytest.approx(total, rel=1e-3)
        assert scores.probs == pytest.approx({choice: p / total for choice, p in begins.items()}, rel=1e-3)
