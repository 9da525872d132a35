"""The joint law of several tokens over several rounds: what one round alone cannot show.

Vocabulary of 4, order-1 target and draft, block of 4. Half a million rows decode their first 4 tokens; the 256
outcomes are compared with the exact law. Key layouts and residuals known to be wrong must fail the same test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspark_batch.sampling.streams import Stream, stream_uniforms
from dspark_batch.verification.block import verify_block_slots
from dspark_batch.verification.rejection import RejectionNoise, Slots
from dspark_batch.verification.token import verify_token_slots

VOCAB, GAMMA, LENGTH, NUM_ROWS = 4, 4, 4, 500_000
VERIFY = {"token": verify_token_slots, "block": verify_block_slots}
DEGREES = VOCAB**LENGTH - 1
LIMIT = DEGREES + 5 * (2 * DEGREES) ** 0.5
"""Five standard deviations above the mean of a chi-square with 255 degrees of freedom."""

Counter = Callable[[Tensor, int, int], Tensor]
"""(emitted tokens [R], round, slot) -> the number that keys the draw of this slot beside the row."""


def by_round(emitted: Tensor, round_index: int, slot: int) -> Tensor:
    return torch.full_like(emitted, round_index * 16 + slot)


def by_position(emitted: Tensor, round_index: int, slot: int) -> Tensor:
    return emitted + slot


def models(seed: int = 2) -> tuple[Tensor, Tensor]:
    """Transition matrices [V, V] of the target and the draft; the state before the first token is 0."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.randn(VOCAB, VOCAB, generator=rng).softmax(-1)
    draft = torch.randn(VOCAB, VOCAB, generator=rng).softmax(-1)
    return target, draft


def uniforms(stream: Stream, rows: Tensor, counter: Tensor) -> Tensor:
    return stream_uniforms(stream, keys=rows, rounds=counter, num_slots=1).squeeze(1)


def run_round(mode: str, rows: Tensor, state: Tensor, emitted: Tensor, round_index: int, counter: Counter) -> Tensor:
    """One round of ``rows``; gives [R, GAMMA + 1] emitted tokens, -1 past the end."""
    target, draft = models()
    drafted = []
    given = [state]
    for k in range(GAMMA):
        u = uniforms(Stream.DRAFT, rows, counter(emitted, round_index, k))
        cdf = draft.double().cumsum(1)[given[-1]]
        drafted.append((u.unsqueeze(1) >= cdf[:, :-1] / cdf[:, -1:]).sum(1))
        given.append(drafted[-1])
    tokens, states = torch.stack(drafted, 1), torch.stack(given, 1)
    count = len(rows)
    slots = Slots(
        num_slots=torch.full((count,), GAMMA),
        token_ids=tokens,
        target_row=torch.arange(count) * (GAMMA + 1),
        draft_row=torch.arange(count) * GAMMA,
    )
    accept = [uniforms(Stream.ACCEPT, rows, counter(emitted, round_index, k)) for k in range(GAMMA)]
    noise = RejectionNoise(
        accept=torch.stack(accept, 1),
        residual=uniforms(Stream.RESIDUAL, rows, counter(emitted, round_index, 0)),
    )
    accepted, after = VERIFY[mode](slots, target[states.flatten()], draft[states[:, :-1].flatten()], noise)
    out = torch.nn.functional.pad(tokens, (0, 1), value=-1)
    slot = torch.arange(GAMMA + 1)
    out = torch.where(slot < accepted.unsqueeze(1), out, -1)
    return out.scatter(1, accepted.unsqueeze(1), after.unsqueeze(1))


def chi_square(mode: str, counter: Counter, num_rows: int = NUM_ROWS) -> float:
    """The statistic of the first LENGTH tokens of ``num_rows`` rows against the exact law."""
    output = torch.zeros(num_rows, LENGTH + GAMMA + 1, dtype=torch.int64)
    emitted = torch.zeros(num_rows, dtype=torch.int64)
    for round_index in range(LENGTH):
        rows = (emitted < LENGTH).nonzero().squeeze(1)
        length = emitted[rows]
        state = torch.where(length > 0, output[rows, (length - 1).clamp_min(0)], 0)
        new = run_round(mode, rows, state, length, round_index, counter)
        at = (length.unsqueeze(1) + torch.arange(GAMMA + 1)).clamp_max(LENGTH + GAMMA)
        real = new >= 0
        output[rows.unsqueeze(1).expand_as(at)[real], at[real]] = new[real]
        emitted[rows] = length + real.sum(1)
    assert (emitted >= LENGTH).all()
    code = (output[:, :LENGTH] * VOCAB ** torch.arange(LENGTH)).sum(1)
    observed = torch.bincount(code, minlength=VOCAB**LENGTH).double()
    expected = exact_law() * num_rows
    assert expected.min() > 5
    return float(((observed - expected) ** 2 / expected).sum())


def exact_law() -> Tensor:
    """[V ** LENGTH] probabilities, first token least significant."""
    target = models()[0].double()
    law = torch.ones(1).double()
    state = torch.zeros(1, dtype=torch.int64)
    for _ in range(LENGTH):
        law = (law.unsqueeze(0) * target[state].T).flatten()
        state = torch.arange(VOCAB).repeat_interleave(len(state))
    return law


@pytest.mark.parametrize("mode", VERIFY)
def test_keys_by_row_round_and_slot_keep_the_joint_law_over_rounds(mode: str) -> None:
    assert chi_square(mode, by_round) < LIMIT


def test_position_keys_keep_token_verification_but_bias_block_verification() -> None:
    assert chi_square("token", by_position) < LIMIT
    assert chi_square("block", by_position) > 2 * LIMIT


@pytest.mark.parametrize("mode", VERIFY)
def test_a_broken_residual_is_seen(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def target_instead(slots: Slots, num_accepted: Tensor, weight: Tensor, p: Tensor, q: Tensor | None) -> Tensor:
        return p[slots.target_row + num_accepted]

    monkeypatch.setattr("dspark_batch.verification.rejection.residual_weights", target_instead)
    assert chi_square(mode, by_round, 200_000) > 2 * LIMIT


def test_one_stream_for_draft_and_residual_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream.RESIDUAL, "_value_", Stream.DRAFT.value)
    assert chi_square("token", by_round, 300_000) > 2 * LIMIT
