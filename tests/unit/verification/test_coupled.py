from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.core import SamplingParams
from dspark_batch.verification.base import VerifyRow
from dspark_batch.verification.coupled import CoupledVerifier
from dspark_batch.verification.reference import coupled_row


class GivenDraws:
    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def draw(self) -> list[int]:
        return self._tokens

    def probs(self) -> torch.Tensor:
        raise AssertionError("coupled verification needs no probabilities")


def row(draft: Sequence[int]) -> VerifyRow:
    return VerifyRow(
        sampling=SamplingParams(), noise_key=0, request_id="r", sample=0, round_index=0, draft=tuple(draft)
    )


@pytest.mark.parametrize(
    ("draft", "drawn", "accepted", "following"),
    [
        ((), (4,), 0, 4),
        ((1, 2), (1, 2, 3), 2, 3),
        ((1, 2), (1, 9, 3), 1, 9),
        ((1, 2), (7, 2, 3), 0, 7),
    ],
)
def test_the_first_unequal_draw_or_the_bonus_is_emitted(
    draft: tuple[int, ...], drawn: tuple[int, ...], accepted: int, following: int
) -> None:
    verdict = CoupledVerifier().verify([row(draft)], GivenDraws(drawn))
    assert (list(verdict.num_accepted), list(verdict.next_token)) == ([accepted], [following])


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 7), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_ragged_rows_agree_with_the_oracle_row_by_row(seed: int, lengths: list[int]) -> None:
    generator = np.random.default_rng(seed)
    vocab_size = 3
    drafts = [generator.integers(0, vocab_size, length).tolist() for length in lengths]
    log_probs = [np.log(generator.dirichlet(np.ones(vocab_size), length + 1)) for length in lengths]
    gumbel = [generator.gumbel(size=(length + 1, vocab_size)) for length in lengths]
    drawn = [int(t) for lp, g in zip(log_probs, gumbel, strict=True) for t in (lp + g).argmax(-1)]
    verdict = CoupledVerifier().verify([row(d) for d in drafts], GivenDraws(drawn))
    expected = [coupled_row(lp, g, d) for lp, g, d in zip(log_probs, gumbel, drafts, strict=True)]
    assert list(zip(verdict.num_accepted, verdict.next_token, strict=True)) == expected
