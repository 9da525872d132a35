import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.core import SamplingParams
from dspark_batch.sampling import reference
from dspark_batch.sampling.sampler import PositionBatch, SampledRow

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.2, top_k=5, repetition_penalty=1.4),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(temperature=2.0, min_p=0.05, top_p=0.99),
]


def random_rows(seed: int, num_rows: int, vocab_size: int) -> list[SampledRow]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        draft = generator.integers(0, vocab_size, int(generator.integers(0, 5))).tolist()
        words = generator.integers(-(2**31), 2**31, (len(draft) + 1, (vocab_size + 31) // 32), np.int32)
        row = SampledRow(
            sampling=PARAMS[int(generator.integers(len(PARAMS)))],
            noise_key=int(generator.integers(-(2**62), 2**62)),
            start=int(generator.integers(0, 1000)),
            draft=draft,
            seen=generator.integers(0, vocab_size, int(generator.integers(1, 9))),
            masks=words if generator.integers(2) else None,
        )
        rows.append(row)
    return rows


def allowed(row: SampledRow, logits: list[float], j: int) -> list[float]:
    """The logits at position j with what its mask forbids at -inf."""
    if row.masks is None:
        return logits
    words = row.masks[j].tolist()
    return [x if words[i // 32] >> i % 32 & 1 else -math.inf for i, x in enumerate(logits)]


@given(seed=st.integers(0, 10**6), num_rows=st.sampled_from([1, 3, 7]), vocab_size=st.sampled_from([11, 501]))
@settings(max_examples=25, deadline=None)
def test_ragged_rows_with_parameters_of_their_own_draw_what_the_oracle_draws(
    seed: int, num_rows: int, vocab_size: int
) -> None:
    rows = random_rows(seed, num_rows, vocab_size)
    num_positions = sum(len(row.draft) + 1 for row in rows)
    logits = torch.randn(num_positions, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    drawn = PositionBatch(logits.clone(), rows).draw()
    flat = 0
    for row in rows:
        for j in range(len(row.draft) + 1):
            expected = reference.draw(
                allowed(row, logits[flat].tolist(), j),
                row.sampling,
                noise_key=row.noise_key,
                position=row.start + j,
                seen=[*row.seen.tolist(), *row.draft[:j]] if row.seen is not None else [],
            )
            assert drawn[flat] == expected
            flat += 1


@pytest.mark.parametrize("sampling", PARAMS)
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(sampling: SamplingParams) -> None:
    vocab_size = 401
    others = random_rows(1, 6, vocab_size)
    row = SampledRow(sampling, 123456789, 17, (3, 4), np.array([1, 2, 3]))
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(3, vocab_size, generator=generator)
    alone = PositionBatch(own.clone(), [row]).draw()
    num_before = sum(len(r.draft) + 1 for r in others[:4])
    num_after = sum(len(r.draft) + 1 for r in others[4:])
    noise = torch.randn(num_before + num_after, vocab_size, generator=generator)
    together = torch.cat((noise[:num_before], own, noise[num_before:]))
    assert PositionBatch(together, [*others[:4], row, *others[4:]]).draw()[num_before : num_before + 3] == alone


@pytest.mark.parametrize("cuts", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_every_temperature_that_is_taken_keeps_scores_finite(cuts: dict[str, Any]) -> None:
    logits = 1e4 * torch.randn(4, 301, generator=torch.Generator().manual_seed(2))
    batch = PositionBatch(logits.clone(), [SampledRow(SamplingParams(temperature=1e-6, **cuts), 9, 5, (1, 2, 3))])
    assert batch.draw() == logits.argmax(-1).tolist()
    assert torch.equal(batch.probs(), torch.nn.functional.one_hot(logits.argmax(-1), 301).float())
    with pytest.raises(ValueError, match=r"sampling\.temperature .* at least 1e-06, got 1e-38"):
        SamplingParams(temperature=1e-38, **cuts)


def test_the_sampled_law_with_cuts_passes_a_chi_square_test() -> None:
    logits = [1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -4.0]
    sampling = SamplingParams(temperature=0.9, top_p=0.95, top_k=6)
    num = 20_000
    rows = [SampledRow(sampling, key, 0, [0] * 199) for key in range(num // 200)]
    drawn = PositionBatch(torch.tensor(logits).repeat(num, 1), rows).draw()
    law = np.exp(reference.log_probs(logits, sampling))
    counts = np.bincount(drawn, minlength=len(logits))
    assert counts[law == 0].sum() == 0
    kept = law > 0
    statistic = float(((counts[kept] - num * law[kept]) ** 2 / (num * law[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert (statistic - freedom) / math.sqrt(2 * freedom) < 4.5


@pytest.mark.parametrize("sampling", PARAMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_is_flagged_at_its_position_only(sampling: SamplingParams, bad: float) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = bad
    batch = PositionBatch(logits, [SampledRow(sampling, 5, 0, (1, 2), np.array([1]))])
    assert batch.finite() == [True, False, True]
    assert len(batch.draw()) == 3


def test_a_position_without_any_possible_token_is_flagged() -> None:
    batch = PositionBatch(torch.full((1, 5), -torch.inf), [SampledRow(SamplingParams(), 0, 0, ())])
    assert batch.finite() == [False]


def test_logprobs_are_after_the_penalty_and_before_the_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    sampling = SamplingParams(temperature=5.0, repetition_penalty=2.0)
    batch = PositionBatch(logits.clone(), [SampledRow(sampling, 0, 0, (), np.array([2]))])
    (found,) = batch.logprobs([0], [3], 2)
    expected = torch.tensor([1.0, 2.0, 1.5, -1.0]).log_softmax(-1).tolist()
    assert found.token_id == 3
    assert found.logprob == pytest.approx(expected[3], abs=1e-6)
    assert found.top_token_ids == (1, 2)
    assert found.top_logprobs == pytest.approx((expected[1], expected[2]), abs=1e-6)
