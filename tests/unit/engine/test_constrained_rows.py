"""Rows whose text is constrained: how they end, what they cost, how they fail, and the law of what they draw."""

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from dspark_batch.core import Constraint, ErrorCode, FinishReason, Request, Result, SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.engine.config import EngineConfig, VerificationMode
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.sampling import reference
from dspark_batch.tensors import DraftBlock
from dspark_batch.testing.scripted_drafters import RandomDrafter
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget

VOCAB = 32
EOS = LetterCodec.alphabet.index("f")
PROMPT = (3, 1, 4)
WORDS = ["ab", "abba", "ada", "bad", "ce"]


def model(contrast: float = 6.0) -> ScriptedModel:
    target = ScriptedTarget(vocab_size=VOCAB, max_context=64, contrast=contrast)
    return ScriptedModel(target=target, codec=LetterCodec(VOCAB), eos_token_ids=frozenset({EOS}))


def choices(*words: str) -> Constraint:
    return Constraint("choices", json.dumps(words))


def run(sampling: dict[str, SamplingParams], **settings: Any) -> dict[str, Result]:
    """One request for each id."""
    requests = [Request(id=name, prompt_token_ids=PROMPT, sampling=params) for name, params in sampling.items()]
    config = EngineConfig(drafter="none", schedule="off", poison_dead_kv=True, **settings)
    with BatchEngine(model(), config) as engine:
        return {result.id: result for result in engine.generate(requests)}


def test_a_text_that_its_first_token_decides_needs_no_round() -> None:
    (result,) = run({"r": SamplingParams(constraint=choices("abcdeg", "xyzuvw"))}).values()
    assert result.text in ("abcdeg", "xyzuvw")
    assert (result.finish_reason, result.num_rounds, result.num_generated_tokens) == (FinishReason.STOP, 0, 6)


def test_what_has_to_come_is_verified_in_one_round() -> None:
    constraint = Constraint("regex", "[abc]deghi[abc]")
    (result,) = run({"r": SamplingParams(constraint=constraint)}).values()
    assert result.text is not None
    assert result.text[1:6] == "deghi"
    assert (result.num_rounds, result.num_drafted_tokens, result.num_accepted_tokens) == (1, 5, 5)


def test_logprobs_are_those_among_what_is_allowed() -> None:
    free = run({"r": SamplingParams(logprobs=VOCAB, max_new_tokens=1)})["r"].logprobs
    found = run({"r": SamplingParams(logprobs=2, constraint=choices("abc", "xyz"))})["r"]
    assert free is not None
    assert found.logprobs is not None
    logits = dict(zip(free[0].top_token_ids, free[0].top_logprobs, strict=True))
    a, x = (logits[LetterCodec.alphabet.index(letter)] for letter in "ax")
    assert found.logprobs[0].logprob == pytest.approx(max(a, x) - np.logaddexp(a, x), abs=1e-5)
    assert [position.logprob for position in found.logprobs[1:]] == [0.0, 0.0]
    assert len(found.logprobs) == found.num_generated_tokens == 3


def test_a_length_limit_cuts_a_constrained_text_too() -> None:
    (result,) = run({"r": SamplingParams(constraint=choices("abcdeg"), max_new_tokens=4)}).values()
    assert (result.text, result.finish_reason) == ("abcd", FinishReason.LENGTH)


def test_a_wrong_constraint_fails_its_row_alone() -> None:
    results = run(
        {
            "wrong": SamplingParams(constraint=Constraint("regex", "(a")),
            "right": SamplingParams(constraint=choices("ab")),
            "free": SamplingParams(max_new_tokens=3),
        }
    )
    assert results["wrong"].error is not None
    assert results["wrong"].error.code is ErrorCode.INVALID_SAMPLING
    assert "unclosed group" in results["wrong"].error.message
    assert results["right"].text == "ab"
    assert results["free"].error is None


def test_a_constraint_that_breaks_on_the_way_fails_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark_batch.sampling.constraints.Matcher.error", "too complex")
    results = run({"bad": SamplingParams(constraint=choices("ab")), "free": SamplingParams(max_new_tokens=3)})
    assert results["bad"].error is not None
    assert results["bad"].error.code is ErrorCode.CONSTRAINT_ERROR
    assert results["free"].error is None


class SampledDrafter(RandomDrafter):
    """Draws every token from one law over the vocabulary, and says so."""

    def propose(self, rows: list[DraftRow], max_tokens: list[int]) -> DraftBlock:  # type: ignore[override]
        law = torch.linspace(1.0, 3.0, VOCAB) / torch.linspace(1.0, 3.0, VOCAB).sum()
        drafts = [self._random.choices(range(VOCAB), law.tolist(), k=self._random.randint(0, n)) for n in max_tokens]
        return DraftBlock(token_ids=drafts, probs=[law.expand(len(draft), VOCAB) for draft in drafts])


def exact_law(served: ScriptedModel, words: list[str]) -> dict[str, float]:
    """The chance of each word by sampling among what may come, token by token."""
    law = dict.fromkeys(words, 0.0)
    open_texts = [("", 1.0)]
    while open_texts:
        text, chance = open_texts.pop()
        after = {w[len(text)] for w in words if w.startswith(text) and w != text}
        if not after:
            law[text] += chance
            continue
        allowed = {LetterCodec.alphabet.index(letter) for letter in after} | ({EOS} if text in words else set())
        logits = served.target.expected_logits([*PROMPT, *LetterCodec().encode(text)]).tolist()
        masked = [logit if i in allowed else -math.inf for i, logit in enumerate(logits)]
        chances = np.exp(reference.log_probs(masked, SamplingParams(temperature=1.0)))
        for i in allowed:
            if i == EOS:
                law[text] += chance * float(chances[i])
            else:
                open_texts.append((text + LetterCodec.alphabet[i], chance * float(chances[i])))
    return law


@pytest.mark.parametrize("mode", ["token", "block", "coupled"])
def test_sampled_drafts_keep_the_law_of_the_constrained_target(mode: VerificationMode) -> None:
    num = 2000
    sampling = SamplingParams(temperature=1.0, constraint=choices(*WORDS))
    requests = [Request(id=f"row-{i}", prompt_token_ids=PROMPT, sampling=sampling) for i in range(num)]
    served = model(contrast=1.5)
    config = EngineConfig(verification=mode, schedule="fixed", max_concurrency=128)
    with BatchEngine(served, config, drafter=SampledDrafter(vocab_size=VOCAB, max_draft_tokens=3)) as engine:
        counts = Counter(result.text for result in engine.generate(requests))
    law = exact_law(served, WORDS)
    assert sum(law.values()) == pytest.approx(1.0)
    assert set(counts) <= set(WORDS)
    statistic = sum((counts[word] - num * chance) ** 2 / (num * chance) for word, chance in law.items())
    freedom = len(WORDS) - 1
    assert min(law.values()) * num > 5
    assert (statistic - freedom) / math.sqrt(2 * freedom) < 4.5
