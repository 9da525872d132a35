import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from dspark_batch.core import SamplingParams
from dspark_batch.sampling import probs, reference
from dspark_batch.sampling.sampler import PositionBatch, SampledRow

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 2, 5, 37, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([None, 0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)


def by_transformers(logits: torch.Tensor, sampling: SamplingParams, seen: list[int]) -> torch.Tensor:
    ids, scores = torch.tensor([seen or [0]]), logits.unsqueeze(0).clone()
    steps = []
    if seen and sampling.repetition_penalty != 1.0:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        steps.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(hf.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.double().softmax(-1)[0]


def by_us(logits: torch.Tensor, sampling: SamplingParams, seen: list[int]) -> torch.Tensor:
    row = SampledRow(sampling, noise_key=0, start=0, draft=(), seen=np.array(seen, dtype=np.int64))
    return PositionBatch(logits.unsqueeze(0).clone(), [row]).probs()[0].double()


@given(sampling=params, seed=st.integers(0, 10**6), vocab_size=st.sampled_from([3, 41, 1013]))
@settings(max_examples=150, deadline=None)
def test_the_distribution_equals_that_of_transformers_logits_processors(
    sampling: SamplingParams, seed: int, vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=generator) * 3
    seen = torch.randint(0, vocab_size, (7,), generator=generator).tolist()
    ours, theirs = by_us(logits, sampling, seen), by_transformers(logits, sampling, seen)
    oracle = torch.from_numpy(np.exp(reference.log_probs(logits.tolist(), sampling, seen=seen)))
    assert torch.allclose(ours, theirs, atol=2e-6)
    assert torch.allclose(ours, oracle, atol=2e-6)


@given(sampling=params, seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_equal_logits_are_kept_or_cut_together(sampling: SamplingParams, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (300,), generator=generator).float()
    ours = by_us(logits, sampling, [])
    oracle = torch.from_numpy(np.exp(reference.log_probs(logits.tolist(), sampling)))
    assert torch.allclose(ours, oracle, atol=2e-6)
    for value in logits.unique():
        assert len(ours[logits == value].unique()) == 1


def test_a_flat_distribution_makes_the_search_widen_to_the_whole_vocabulary() -> None:
    logits = torch.zeros(2, 5000)
    logits[1, :10] = 20.0
    support = probs.limited_support(logits, [SamplingParams(temperature=1.0, top_p=0.9)] * 2)
    assert int(support.scores[0].isfinite().sum()) == 5000
    assert int(support.scores[1].isfinite().sum()) == 10
    assert sorted(support.token_ids[1, :10].tolist()) == list(range(10))


def test_top_p_beyond_the_first_width_equals_the_oracle() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 3001, generator=generator) * 0.5
    samplings = [SamplingParams(temperature=1.0, top_p=p) for p in (0.3, 0.6, 0.97)]
    support = probs.limited_support(logits, samplings)
    for r, sampling in enumerate(samplings):
        expected = reference.log_probs(logits[r].tolist(), sampling)
        kept = set(support.token_ids[r][support.scores[r].isfinite()].tolist())
        assert kept == set(np.flatnonzero(np.isfinite(expected)).tolist())
        assert len(kept) > 256 or r == 0


@pytest.mark.parametrize("doubled", [False, True])
def test_a_token_seen_twice_is_penalised_once(doubled: bool) -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0]])
    seen = np.array([0, 1, 0, 1] if doubled else [0, 1])
    probs.penalise_(logits, [0], [seen], [2.0])
    assert logits.tolist() == [[1.0, -4.0, 4.0]]


def test_min_p_finds_rows_with_few_candidates_beside_rows_with_many() -> None:
    """A row is padded to the longest row's candidates; the padding says nothing about its floor."""
    flat = torch.randn(1, 20_011, generator=torch.Generator().manual_seed(0)) * 0.1
    tied = flat.clone()
    tied[0, :5000] = flat.max() + 1.0
    sampling = SamplingParams(temperature=1.0, min_p=0.5)
    alone = probs.limited_support(flat.clone(), [sampling])
    together = probs.limited_support(torch.cat((flat, tied)), [sampling, sampling])
    assert (together.scores[0] > -torch.inf).sum() == (alone.scores[0] > -torch.inf).sum()


def test_logits_that_tie_once_one_is_penalised_are_kept_together_by_the_oracle_too() -> None:
    """The quotient is rounded to float32, in which the two are equal; in float64 the third token would be cut."""
    seen = 4.052073955535889
    equal = float(np.float32(seen) / np.float32(1.3))
    assert equal != float(np.float32(seen)) / 1.3
    logits = torch.tensor([5.0, equal, seen, 1.0])
    sampling = SamplingParams(temperature=1.5, top_k=2, repetition_penalty=1.3)
    ours = by_us(logits, sampling, [2])
    assert (ours > 0).flatten().tolist() == [True, True, True, False]
    assert np.isfinite(reference.log_probs(logits.tolist(), sampling, seen=[2])).tolist() == [True, True, True, False]
