"""The vectorised rules decide as their one-row float64 oracles do, over ragged rows of every kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dspark_batch.core import SamplingParams
from dspark_batch.sampling.noise import noise_key
from dspark_batch.sampling.streams import rejection_uniforms
from dspark_batch.verification import rejection_verifier
from dspark_batch.verification.base import VerifyRow
from dspark_batch.verification.block import BlockVerifier
from dspark_batch.verification.reference_rejection import block_row, one_hot_rows, token_row
from dspark_batch.verification.rejection_verifier import RejectionVerifier
from dspark_batch.verification.token import TokenVerifier

VERIFIERS: dict[str, tuple[type[RejectionVerifier], object]] = {
    "token": (TokenVerifier, token_row),
    "block": (BlockVerifier, block_row),
}
LENGTHS = (0, 1, 7, 3, 5, 11, 2, 0, 4)


class Target:
    """Given probabilities; draws their argmax."""

    def __init__(self, probs: torch.Tensor) -> None:
        self._probs = probs
        self.asked_probs = False

    def draw(self) -> list[int]:
        return [int(token) for token in self._probs.argmax(1)]

    def probs(self) -> torch.Tensor:
        self.asked_probs = True
        return self._probs


def random_round(seed: int, vocab_size: int, sharpness: float) -> tuple[list[VerifyRow], torch.Tensor]:
    """Ragged rows: sampled and one-hot drafts, zeros in both laws, some drafts close to the target."""
    rng = torch.Generator().manual_seed(seed)
    rows, probs = [], []
    for index, length in enumerate(LENGTHS):
        logits = torch.randn(length + 1, vocab_size, generator=rng) * sharpness
        logits[torch.rand(logits.shape, generator=rng) < 0.3] = -torch.inf
        logits[:, index % vocab_size] = 1.0
        near = logits + torch.randn(logits.shape, generator=rng) * (0.0, 0.1, 2.0)[index % 3]
        q = near[:length].softmax(-1)
        draft = torch.multinomial(q, 1, generator=rng).squeeze(1) if length else torch.zeros(0)
        probs.append(logits.softmax(-1))
        rows.append(make_row(index, draft.long().tolist(), None if (seed + index) % 3 == 0 else q, seed))
    return rows, torch.cat(probs)


def make_row(index: int, draft: Sequence[int], q: torch.Tensor | None, round_index: int = 0) -> VerifyRow:
    return VerifyRow(
        sampling=SamplingParams(temperature=1.0),
        noise_key=noise_key(7, f"row {index}", 0),
        request_id=f"row {index}",
        sample=0,
        round_index=round_index,
        draft=draft,
        draft_probs=q,
    )


@pytest.mark.parametrize("mode", VERIFIERS)
@pytest.mark.parametrize("vocab_size", [2, 5, 101])
def test_every_decision_equals_the_oracles(mode: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, oracle = VERIFIERS[mode]
    seen: set[int] = set()
    for seed in range(40):
        rows, probs = random_round(seed, vocab_size, sharpness=(0.5, 2.0, 6.0)[seed % 3])
        monkeypatch.setattr(rejection_verifier, "MAX_CHUNK_ELEMENTS", (2**26, 7 * vocab_size)[seed % 2])
        verdict = kind(rejection_uniforms).verify(rows, Target(probs))
        first = 0
        for r, row in enumerate(rows):
            length = len(row.draft)
            p = probs[first : first + length + 1].double()
            q = one_hot_rows(row.draft, vocab_size) if row.draft_probs is None else row.draft_probs.double()
            accept, residual = rejection_uniforms(
                torch.tensor([row.noise_key]), torch.tensor([row.round_index]), max(LENGTHS)
            )
            expected = oracle(p, q, row.draft, accept[0], float(residual))  # type: ignore[operator]
            assert (verdict.num_accepted[r], verdict.next_token[r]) == expected, (seed, r)
            seen.add(verdict.num_accepted[r])
            first += length + 1
    assert {0, 1, 2, 3} <= seen


@pytest.mark.parametrize("mode", VERIFIERS)
def test_temperature_zero_gives_the_greedy_tokens_alone_and_in_a_mixed_batch(mode: str) -> None:
    verifier = VERIFIERS[mode][0](rejection_uniforms)
    rng = torch.Generator().manual_seed(3)
    probs = torch.nn.functional.one_hot(torch.randint(4, (400, 5), generator=rng), 4).float()
    rows, expected = [], []
    for index in range(400):
        q = torch.rand(4, 4, generator=rng).softmax(-1)
        draft = torch.randint(4, (4,), generator=rng).tolist()
        rows.append(make_row(index, draft, q if index % 2 else None))
        greedy = probs[index].argmax(1).tolist()
        stands = next((k for k in range(4) if draft[k] != greedy[k]), 4)
        expected.append((stands, greedy[stands]))
    mixed = verifier.verify(rows, Target(probs.flatten(0, 1)))
    assert list(zip(mixed.num_accepted, mixed.next_token, strict=True)) == expected

    cold = [
        VerifyRow(SamplingParams(), r.noise_key, r.request_id, 0, 0, draft=r.draft, draft_probs=r.draft_probs)
        for r in rows
    ]
    target = Target(probs.flatten(0, 1))
    verdict = verifier.verify(cold, target)
    assert list(zip(verdict.num_accepted, verdict.next_token, strict=True)) == expected
    assert not target.asked_probs


@pytest.mark.parametrize("mode", VERIFIERS)
def test_a_draft_from_the_target_itself_is_accepted_whole(mode: str) -> None:
    rng = torch.Generator().manual_seed(5)
    probs = torch.randn(50 * 9, 1000, generator=rng).softmax(-1)
    rows = []
    for index in range(50):
        q = probs[index * 9 : index * 9 + 8]
        rows.append(make_row(index, torch.multinomial(q, 1, generator=rng).squeeze(1).tolist(), q.clone()))
    verdict = VERIFIERS[mode][0](rejection_uniforms).verify(rows, Target(probs))
    assert verdict.num_accepted == [8] * 50


@pytest.mark.parametrize("mode", VERIFIERS)
def test_a_residual_lost_to_rounding_falls_back_to_the_target(mode: str) -> None:
    class Never:
        """Rejects everything, as if the accept numbers sat on the edge of 1."""

        def __call__(self, keys: torch.Tensor, rounds: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((len(keys), k), 1.5, dtype=torch.float64), torch.full((len(keys),), 0.5).double()

    p = torch.tensor([[0.1, 0.0, 0.9]]).repeat(2, 1)
    verdict = VERIFIERS[mode][0](Never()).verify([make_row(0, [2], p[:1])], Target(p))
    assert (verdict.num_accepted, verdict.next_token) == ([0], [2])


@pytest.mark.parametrize("mode", VERIFIERS)
@pytest.mark.parametrize("is_target", [False, True])
def test_a_distribution_that_is_not_finite_ends_the_draft_before_it(mode: str, is_target: bool) -> None:
    """As if the draft had been cut there, which is exact: no token's fate hangs on the token itself."""
    verifier = VERIFIERS[mode][0](rejection_uniforms)
    rng = torch.Generator().manual_seed(8)
    outcomes = set()
    for index in range(60):
        logits = 2 * torch.randn(6, 13, generator=rng)
        p, q = logits.softmax(-1), (logits + 0.5 * torch.randn(6, 13, generator=rng))[:5].softmax(-1)
        draft = torch.multinomial(q, 1, generator=rng).squeeze(1).tolist()
        first = index % 5
        bad_p, bad_q = p.clone(), q.clone()
        bad = bad_p if is_target else bad_q
        bad[first:] = torch.nan
        if index % 2:
            # What a limited support without a score leaves, and the draw from it.
            bad[first, 1:], draft[first] = 0.0, 12
        verdict = verifier.verify([make_row(index, draft, bad_q)], Target(bad_p))
        cut = verifier.verify([make_row(index, draft[:first], q[:first])], Target(p[: first + 1]))
        assert verdict.num_accepted == cut.num_accepted
        if not is_target or cut.num_accepted[0] < first:
            assert verdict.next_token == cut.next_token
        outcomes.add(cut.num_accepted[0])
    assert {0, 1, 2, 3} <= outcomes


def test_long_products_of_small_ratios_neither_vanish_nor_overflow() -> None:
    # 60 slots at ratio 1e-12 and then 60 at 1e12: P stays tiny, then climbs back to exactly 1.
    length = 120
    p = torch.full((length + 1, 2), 0.5)
    q = torch.full((length, 2), 0.5)
    p[:60] = torch.tensor([5e-13, 1.0])
    q[60:] = torch.tensor([5e-13, 1.0])
    accept, residual = rejection_uniforms(torch.tensor([1]), torch.tensor([0]), length)
    verdict = BlockVerifier(lambda *_: (accept, residual)).verify([make_row(0, [0] * length, q)], Target(p))
    assert verdict.num_accepted == [length]
