"""The first sequential head: scores of bigrams against counting by hand, and their factors."""

from __future__ import annotations

import math

import torch

from dspark_batch.testing.tiny_training import random_rows
from dspark_batch.training.bigrams import bigram_factors, bigram_scores
from dspark_batch.training.initial import draft_columns
from dspark_batch.training.sequences import token_row

COLUMNS = draft_columns(8, torch.tensor([1, 2, 5, 6]))


def test_scores_are_log_ratios_of_smoothed_bigrams_and_unigrams() -> None:
    rows = [token_row("a", [0, 7], [1, 2, 1, 2, 5]), token_row("b", [3], [1, 4, 6])]
    seen, counts, scores = bigram_scores(rows, columns=COLUMNS)
    # Token 4 cannot be drafted, so that 1 -> 4 is left out, and 4 -> 6 is there.
    assert seen.tolist() == [1, 2, 3, 4, 7]
    assert counts.tolist() == [2, 2, 1, 1, 1]
    share = {1: 4 / 11, 2: 3 / 11, 5: 2 / 11, 6: 2 / 11}
    expected = {(1, 2): 2, (2, 1): 1, (2, 5): 1, (3, 1): 1, (4, 6): 1, (7, 1): 1}
    for i, x in enumerate(seen.tolist()):
        for j, y in enumerate(share):
            wanted = math.log1p(expected.get((x, y), 0) / (20 * share[y]))
            assert math.isclose(float(scores[i, j]), wanted, abs_tol=1e-5), (x, y)


def test_factors_of_full_rank_give_the_scores_back_and_surplus_rank_is_zero() -> None:
    rows = random_rows([(2, 40), (1, 60)], vocab_size=8)
    seen, _, scores = bigram_scores(rows, columns=COLUMNS)
    generator = torch.Generator().manual_seed(5)
    tokens, w1, w2 = bigram_factors(rows, columns=COLUMNS, rank=6, generator=generator)
    assert torch.equal(tokens, seen)
    assert w1.shape == (len(seen), 6)
    assert w2.shape == (4, 6)
    torch.testing.assert_close(w1 @ w2.T, scores, atol=1e-4, rtol=1e-4)
    assert not w2[:, 4:].any()
    assert float(w1.abs().quantile(0.9)) <= 1.0
    assert torch.equal(w1, bigram_factors(rows, columns=COLUMNS, rank=6, generator=generator)[1])
