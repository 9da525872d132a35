"""Where an output ends: stop tokens and strings inside a drafted block, length limits, and what the text then is."""

import pytest

from dspark_batch.core import FinishReason, Request, Result, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.sampling.noise import noise_key
from dspark_batch.testing.scripted_drafters import OracleDrafter
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget

PROMPT = (3, 1, 4)


def model(eos: frozenset[int] = frozenset(), codec: LetterCodec | None = None) -> ScriptedModel:
    return ScriptedModel(target=ScriptedTarget(max_context=64), codec=codec or LetterCodec(), eos_token_ids=eos)


def run(served: ScriptedModel, sampling: SamplingParams, *, gamma: int = 7, text: tuple[int, ...] = ()) -> Result:
    """One request, drafted by an oracle that knows ``text`` as the continuation."""
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=sampling)
    drafter = OracleDrafter({noise_key(0, "r", 0): [*PROMPT, *text]}, max_draft_tokens=gamma)
    config = EngineConfig(poison_dead_kv=True, max_draft_tokens=gamma, schedule="fixed")
    with BatchEngine(served, config, drafter=drafter) as engine:
        (result,) = engine.generate([request])
        engine.check_integrity()
    return result


@pytest.fixture(scope="module")
def plain() -> tuple[int, ...]:
    """24 greedy tokens with nothing to stop them."""
    return run(model(), SamplingParams(max_new_tokens=24)).token_ids


def first_new_token(plain: tuple[int, ...], start: int) -> int:
    """The first place from ``start`` on whose token has not occurred before."""
    return next(i for i in range(start, len(plain)) if plain[i] not in plain[:i])


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("gamma", [1, 4, 7, 16])
def test_an_end_of_sequence_token_inside_a_block_drops_the_rest_and_the_bonus(
    plain: tuple[int, ...], start: int, gamma: int
) -> None:
    at = first_new_token(plain, start)
    result = run(model(frozenset({plain[at]})), SamplingParams(max_new_tokens=24), gamma=gamma, text=plain)
    assert result.token_ids == plain[: at + 1]
    assert result.finish_reason is FinishReason.STOP
    assert result.text == LetterCodec().decode(plain[:at])
    assert result.num_generated_tokens == at + 1


def test_ignore_eos_goes_on_but_stop_token_ids_still_stop(plain: tuple[int, ...]) -> None:
    early, late = first_new_token(plain, 1), first_new_token(plain, 3)
    served = model(frozenset({plain[early]}))
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True, stop_token_ids=(plain[late],))
    result = run(served, sampling, text=plain)
    assert result.token_ids == plain[: late + 1]
    assert result.text == LetterCodec().decode(plain[:late])


@pytest.mark.parametrize("gamma", [1, 5, 16])
def test_a_stop_string_across_tokens_cuts_the_text_before_it_and_keeps_its_tokens(
    plain: tuple[int, ...], gamma: int
) -> None:
    text = LetterCodec().decode(plain)
    stop = text[4:7]
    at = text.index(stop)
    result = run(model(), SamplingParams(max_new_tokens=24, stop=("not there", stop)), gamma=gamma, text=plain)
    assert result.text == text[:at]
    assert result.token_ids == plain[: at + 3]
    assert result.finish_reason is FinishReason.STOP


def test_of_two_stop_strings_completed_by_one_token_the_earlier_cut_counts(plain: tuple[int, ...]) -> None:
    text = LetterCodec().decode(plain)
    at = first_new_token(plain, 3)
    result = run(model(), SamplingParams(max_new_tokens=24, stop=(text[at], text[at - 2 : at + 1])), text=plain)
    assert result.text == text[: at - 2]
    assert result.token_ids == plain[: at + 1]


@pytest.mark.parametrize("limit", [1, 2, 8, 9, 23])
def test_the_length_limit_holds_inside_a_block(plain: tuple[int, ...], limit: int) -> None:
    result = run(model(), SamplingParams(max_new_tokens=limit), text=plain)
    assert result.token_ids == plain[:limit]
    assert result.finish_reason is FinishReason.LENGTH
    assert result.text == LetterCodec().decode(plain[:limit])


def test_the_context_clips_max_new_tokens() -> None:
    result = run(model(), SamplingParams(max_new_tokens=1000))
    assert result.num_generated_tokens == 64 - len(PROMPT)
    assert result.finish_reason is FinishReason.LENGTH


def test_without_a_tokenizer_there_are_token_ids_and_no_text() -> None:
    served = ScriptedModel(target=ScriptedTarget())
    result = run(served, SamplingParams(max_new_tokens=3))
    assert (result.text, result.num_generated_tokens) == (None, 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_stand_at_every_emitted_position_and_equal_a_single_pass(
    plain: tuple[int, ...], temperature: float
) -> None:
    sampling = SamplingParams(
        max_new_tokens=17, logprobs=3, temperature=temperature, top_p=0.8, stop_token_ids=(plain[9],)
    )
    result = run(model(), sampling, text=plain)
    assert result.logprobs is not None
    assert len(result.logprobs) == len(result.token_ids)
    target = ScriptedTarget()
    for i, found in enumerate(result.logprobs):
        expected = target.expected_logits([*PROMPT, *result.token_ids[:i]]).log_softmax(-1)
        assert found.token_id == result.token_ids[i]
        assert found.logprob == pytest.approx(float(expected[found.token_id]), abs=1e-5)
        assert found.top_logprobs == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_rows_may_ask_for_different_numbers_of_logprobs() -> None:
    requests = [
        Request(id=f"{k}", prompt_token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=5, logprobs=k))
        for k in (None, 0, 1, 4)
    ]
    with BatchEngine(model(), EngineConfig()) as engine:
        results = list(engine.generate(requests))
    assert results[0].logprobs is None
    for result, num_top in zip(results[1:], (0, 1, 4), strict=True):
        assert result.logprobs is not None
        assert [len(entry.top_token_ids) for entry in result.logprobs] == [num_top] * 5


def test_verified_and_accepted_tokens_are_counted_by_draft_position(plain: tuple[int, ...]) -> None:
    text = [*plain[:3], 0 if plain[3] else 1, *plain[4:]]
    drafter = OracleDrafter({noise_key(0, "r", 0): [*PROMPT, *text]}, max_draft_tokens=4)
    config = EngineConfig(max_draft_tokens=4, schedule="fixed")
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=12))
    with BatchEngine(model(), config, drafter=drafter) as engine:
        assert next(iter(engine.generate([request]))).token_ids == plain[:12]
        # Drafts of 4, 4 and 2 tokens; the first holds for 2.
        assert engine.stats.by_position() == [(3, 3), (3, 3), (2, 1), (2, 1)]
        assert engine.device == "cpu"
