"""Draft tokens against the slow sampler: shared noise, kept distributions, penalties and reduced vocabularies."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.dspark import draft_sampler
from dspark_batch.drafters.dspark.draft_sampler import DraftSampler, DraftVocabulary
from dspark_batch.sampling import noise, reference

V, SLOTS = 67, 4
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(temperature=0.6, top_p=0.8, repetition_penalty=1.7),
    SamplingParams(temperature=0.0, repetition_penalty=1.4),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=2.0, repetition_penalty=0.8),
)
REDUCED = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:29].sort().values


def make_rows() -> list[DraftRow]:
    generator = torch.Generator().manual_seed(1)
    return [
        DraftRow(
            handle=i,
            noise_key=noise.noise_key(3, f"row-{i}", 0),
            sampling=sampling,
            token_ids=torch.randint(0, V, (3 + 4 * i,), generator=generator).tolist(),
            prompt_len=2,
        )
        for i, sampling in enumerate(SAMPLINGS)
    ]


def make_sampler(
    rows: Sequence[DraftRow], token_ids: Tensor | None, *, shared: bool, rounds: Sequence[int] | None = None
) -> DraftSampler:
    return DraftSampler(
        rows,
        vocabulary=DraftVocabulary(V, token_ids),
        shared_noise=shared,
        rounds=rounds or [0] * len(rows),
        num_slots=SLOTS,
        device=torch.device("cpu"),
    )


def make_logits(token_ids: Tensor | None, *, seed: int = 0) -> list[Tensor]:
    width = V if token_ids is None else len(token_ids)
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(len(SAMPLINGS), width, generator=generator) for _ in range(SLOTS)]


def full_width(logits: Tensor, token_ids: Tensor | None) -> list[float]:
    """Logits over the target's vocabulary, hopeless for tokens that cannot be drafted."""
    if token_ids is None:
        out: list[float] = logits.tolist()
    else:
        out = torch.full((V,), -1e30).index_copy_(0, token_ids, logits).tolist()
    return out


@pytest.mark.parametrize("token_ids", [None, REDUCED], ids=["full", "reduced"])
def test_shared_noise_draws_what_the_targets_sampler_would_from_the_same_logits(token_ids: Tensor | None) -> None:
    rows, slots = make_rows(), make_logits(token_ids)
    sampler = make_sampler(rows, token_ids, shared=True)
    drafted: list[list[int]] = [[] for _ in rows]
    for slot, logits in enumerate(slots):
        drawn = sampler.draw(logits.clone(), slot).tolist()
        for r, row in enumerate(rows):
            seen = [*row.token_ids, *drafted[r]]
            scores = full_width(logits[r], token_ids)
            position = len(row.token_ids) + slot
            if row.sampling.is_greedy:
                assert drawn[r] == int(reference.log_probs(scores, row.sampling, seen=seen).argmax())
            else:
                assert drawn[r] == reference.draw(
                    scores, row.sampling, noise_key=row.noise_key, position=position, seen=seen
                )
            drafted[r].append(drawn[r])
    assert sampler.probs([SLOTS] * len(rows)) is None


@pytest.mark.parametrize("token_ids", [None, REDUCED], ids=["full", "reduced"])
def test_kept_distributions_are_those_of_the_slow_sampler(token_ids: Tensor | None) -> None:
    rows, slots = make_rows(), make_logits(token_ids)
    sampler = make_sampler(rows, token_ids, shared=False)
    drawn = torch.stack([sampler.draw(logits.clone(), slot) for slot, logits in enumerate(slots)], dim=1).tolist()
    lengths = [4, 3, 2, 4, 1, 4, 0]
    probs = sampler.probs(lengths)
    assert probs is not None
    for r, (row, kept) in enumerate(zip(rows, probs, strict=True)):
        if row.sampling.is_greedy:
            assert kept is None
            continue
        assert kept is not None
        assert kept.shape == (lengths[r], V)
        assert kept.dtype == torch.float32
        for slot in range(lengths[r]):
            seen = [*row.token_ids, *drawn[r][:slot]]
            want = np.exp(reference.log_probs(full_width(slots[slot][r], token_ids), row.sampling, seen=seen))
            np.testing.assert_allclose(kept[slot].numpy(), want, atol=1e-6)
            assert kept[slot, drawn[r][slot]] > 0


@pytest.mark.parametrize("token_ids", [None, REDUCED], ids=["full", "reduced"])
def test_draws_follow_the_distribution_that_is_handed_out(token_ids: Tensor | None) -> None:
    [logits, *_] = make_logits(token_ids, seed=7)
    num_draws = 4000
    row = make_rows()[2]
    rows = [
        DraftRow(handle=i, noise_key=noise.noise_key(0, f"r{i}", 0), sampling=row.sampling, token_ids=[1], prompt_len=1)
        for i in range(num_draws)
    ]
    sampler = make_sampler(rows, token_ids, shared=False)
    drawn = sampler.draw(logits[:1].expand(num_draws, -1).clone(), 0)
    probs = sampler.probs([1] * num_draws)
    assert probs is not None
    assert probs[0] is not None
    counts = torch.bincount(drawn, minlength=V).double()
    expected = probs[0][0].double() * num_draws
    assert counts[expected == 0].sum() == 0
    chi_square = float(((counts - expected) ** 2)[expected > 0].div(expected[expected > 0]).sum())
    degrees = int((expected > 0).sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_every_round_and_slot_has_draws_of_its_own() -> None:
    rows = make_rows()
    flat = torch.zeros(len(rows), V)
    draws = []
    for round_index in range(3):
        sampler = make_sampler(rows, None, shared=False, rounds=[round_index] * len(rows))
        draws += [tuple(sampler.draw(flat.clone(), slot).tolist()) for slot in range(SLOTS)]
    assert len(set(draws)) == 3 * SLOTS
    again = make_sampler(rows, None, shared=False, rounds=[1] * len(rows))
    assert tuple(again.draw(flat.clone(), 0).tolist()) == draws[SLOTS]


def test_only_the_best_candidates_are_drawn_from_with_shared_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_sampler, "NUM_CANDIDATES", 3)
    rows = [row for row in make_rows() if row.sampling == SAMPLINGS[1]]
    logits = make_logits(None)[0][:1]
    drawn = {int(make_sampler(rows, None, shared=True).draw(logits.clone(), slot)) for slot in range(60)}
    assert drawn == set(logits[0].topk(3).indices.tolist())


@pytest.mark.parametrize("shared", [True, False])
def test_margins_are_leads_of_the_scores_that_decide(shared: bool) -> None:
    rows, logits = make_rows()[:3], make_logits(None)[0][:3]
    sampler = DraftSampler(
        rows,
        vocabulary=DraftVocabulary(V),
        shared_noise=shared,
        rounds=[0] * 3,
        num_slots=1,
        device=torch.device("cpu"),
    )
    sampler.draw(logits.clone(), 0)
    margins = sampler.margins()
    for r, row in enumerate(rows):
        scores = logits[r].double()
        if shared and not row.sampling.is_greedy:
            keep = scores.topk(row.sampling.top_k or V).indices
            at = torch.tensor([row.noise_key]), torch.tensor([len(row.token_ids)])
            scores = scores / row.sampling.temperature
            scores = (scores + noise.gumbel(*at, torch.arange(V)[None])[0])[keep]
        best, second = scores.sort(descending=True).values[:2].tolist()
        assert margins[r] == [pytest.approx(best - second, rel=1e-4)]
