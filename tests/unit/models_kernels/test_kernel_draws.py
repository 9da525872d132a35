"""Native draws against the torch path of ``sampling``, token for token."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dspark_batch.core import SamplingParams
from dspark_batch.models.kernels.library import Kernels
from dspark_batch.sampling.sampler import PositionBatch, SampledRow

PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1e-6),
    SamplingParams(temperature=70.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.999),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.2, top_k=40),
    SamplingParams(temperature=1.2, top_k=300, top_p=0.6, min_p=0.01),
    SamplingParams(temperature=0.9, min_p=0.08),
    SamplingParams(temperature=2.0, min_p=1e-9),
    SamplingParams(temperature=1.0, repetition_penalty=1.3),
    SamplingParams(),
]


class CountingDraws:
    """Counts draws, and those that are left to torch."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.num_drawn = self.num_undecided = 0
        self.argmax = kernels.argmax

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("not asked for")

    def draw(self, logits: Tensor, *, flat: Tensor, integers: Tensor, reals: Tensor) -> Tensor:
        tokens = self._kernels.draw(logits, flat=flat, integers=integers, reals=reals)
        self.num_drawn += len(tokens)
        self.num_undecided += int((tokens < 0).sum())
        return tokens


def draw_rows(generator: random.Random, sampling: list[SamplingParams], vocab_size: int) -> list[SampledRow]:
    return [
        SampledRow(
            one,
            generator.getrandbits(64) - 2**63,
            generator.randrange(5000),
            [generator.randrange(vocab_size) for _ in range(generator.randrange(3))],
            torch.randint(vocab_size, (7,)).numpy(),
        )
        for one in sampling
    ]


def logits_of(shape: str, num: int, vocab_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, vocab_size, generator=generator) * 2
    if shape == "peaked":
        likely = torch.randint(vocab_size, (num, 9), generator=generator)
        logits.scatter_add_(1, likely, torch.rand(num, 9, generator=generator) * 20)
    elif shape == "tied":
        logits = (logits * 2).round() / 2
    elif shape == "masked":
        logits[:, 3::7] = -torch.inf
        logits[::2, 5:] = -torch.inf
    return logits


@pytest.mark.parametrize("vocab_size", [5, 67, 3001])
@pytest.mark.parametrize("shape", ["flat", "peaked", "tied", "masked"])
def test_ragged_rows_draw_the_tokens_of_the_torch_path(kernels: Kernels, shape: str, vocab_size: int) -> None:
    generator = random.Random(vocab_size)
    for seed in range(4):
        rows = draw_rows(generator, PARAMS, vocab_size)
        num = sum(len(row.draft) + 1 for row in rows)
        logits = logits_of(shape, num, vocab_size, seed)
        want = PositionBatch(logits.clone(), rows)
        got = PositionBatch(logits.clone(), rows, fast=CountingDraws(kernels))
        assert got.draw() == want.draw()
        assert got.finite() == want.finite()


@pytest.mark.parametrize("sampling", PARAMS[:10])
def test_thousands_of_rows_draw_the_tokens_of_the_torch_path(kernels: Kernels, sampling: SamplingParams) -> None:
    generator = random.Random(0)
    counting = CountingDraws(kernels)
    for shape in ("flat", "peaked"):
        rows = draw_rows(generator, [sampling] * 300, 1201)
        logits = logits_of(shape, sum(len(row.draft) + 1 for row in rows), 1201, 11)
        assert PositionBatch(logits.clone(), rows, fast=counting).draw() == PositionBatch(logits, rows).draw()
    assert counting.num_undecided < counting.num_drawn // 20


def test_a_vocabulary_wider_than_the_first_candidates_is_searched_to_its_end(kernels: Kernels) -> None:
    rows = draw_rows(random.Random(2), [SamplingParams(temperature=3.0, top_p=0.9)] * 4, 30_011)
    logits = logits_of("flat", sum(len(row.draft) + 1 for row in rows), 30_011, 1)
    assert PositionBatch(logits.clone(), rows, fast=CountingDraws(kernels)).draw() == PositionBatch(logits, rows).draw()


def test_rows_that_are_not_finite_are_reported_and_disturb_no_other(kernels: Kernels) -> None:
    rows = [SampledRow(sampling, 5, 9, (), torch.arange(3).numpy()) for sampling in PARAMS]
    logits = logits_of("flat", len(rows), 999, 3)
    whole = PositionBatch(logits.clone(), rows, fast=CountingDraws(kernels)).draw()
    logits[1, 998] = torch.nan
    logits[4, 0] = torch.inf
    logits[7] = -torch.inf
    broken = PositionBatch(logits, rows, fast=CountingDraws(kernels))
    assert [i for i, finite in enumerate(broken.finite()) if not finite] == [1, 4, 7]
    assert [t for i, t in enumerate(broken.draw()) if i not in (1, 4, 7)] == [
        t for i, t in enumerate(whole) if i not in (1, 4, 7)
    ]
