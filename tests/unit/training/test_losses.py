"""The fused loss against plain automatic differentiation, and the weights of slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dspark_batch.training import losses
from dspark_batch.training.losses import (
    LossWeights,
    TargetSide,
    confidence_loss,
    draft_loss,
    reference_loss,
    slot_weights,
)

N, U, H, R, VD = 23, 11, 9, 4, 17


def random_case(seed: int, *, num_slots: int = N) -> tuple[Tensor, Tensor, Tensor, TargetSide]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head, hidden = normal(VD, H), normal(U, H)
    weights = torch.rand(num_slots, generator=generator) * (torch.rand(num_slots, generator=generator) > 0.2)
    target = TargetSide(
        head=head,
        hidden=hidden,
        # The whole vocabulary has more mass than the draft's part of it.
        log_z=(hidden @ head.T).logsumexp(-1) + torch.rand(U, generator=generator),
        index=torch.randint(0, U, (num_slots,), generator=generator),
        labels=torch.randint(-1, VD, (num_slots,), generator=generator),
        weights=weights / weights.sum(),
    )
    hidden, z, w2 = normal(num_slots, H), normal(num_slots, R), normal(VD, R)
    return hidden.requires_grad_(), z.requires_grad_(), w2.requires_grad_(), target


@pytest.mark.parametrize("chunk", [1, 5 * VD, 1000 * VD])
@pytest.mark.parametrize(("ce", "soft_ce", "distance"), [(0.3, 0.0, 0.8), (0.2, 0.7, 0.0), (0.1, 0.5, 0.4)])
def test_fused_loss_and_gradients_equal_plain_differentiation(
    chunk: int, ce: float, soft_ce: float, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", chunk)
    weights = LossWeights(ce=ce, soft_ce=soft_ce, distance=distance)
    hidden, z, w2, target = random_case(0)
    fused = draft_loss(hidden, z, w2, target, weights=weights)
    (2.5 * fused.total).backward()
    ours = [t.grad for t in (hidden, z, w2)]
    for tensor in (hidden, z, w2):
        tensor.grad = None
    expected = reference_loss(hidden @ target.head.T + z @ w2.T, target, weights=weights)
    (2.5 * expected).backward()
    torch.testing.assert_close(fused.total, expected)
    for got, tensor in zip(ours, (hidden, z, w2), strict=True):
        torch.testing.assert_close(got, tensor.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 1000 * VD])
def test_slots_weigh_by_the_chance_that_their_block_reaches_them(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", chunk)
    hidden, z, w2, target = random_case(4, num_slots=24)
    blocks = replace(target, slots_per_block=3)
    weights = LossWeights(ce=0.3, soft_ce=0.5, distance=0.2, reach=0.75)
    loss = draft_loss(hidden, z, w2, blocks, weights=weights)
    loss.total.backward()  # type: ignore[no-untyped-call]
    ours = hidden.grad
    hidden.grad = None
    expected = reference_loss(hidden @ target.head.T + z @ w2.T, blocks, weights=weights)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(ours, hidden.grad, atol=1e-6, rtol=1e-4)


def test_without_normalisers_the_draft_vocabulary_is_the_whole() -> None:
    hidden, z, w2, target = random_case(3)
    bare = replace(target, log_z=None)
    weights = LossWeights(ce=0.3, soft_ce=0.2, distance=0.8)
    loss = draft_loss(hidden, z, w2, bare, weights=weights)
    torch.testing.assert_close(loss.total, reference_loss(hidden @ target.head.T + z @ w2.T, bare, weights=weights))
    whole = replace(target, log_z=(target.hidden @ target.head.T).logsumexp(-1))
    torch.testing.assert_close(loss.distances, draft_loss(hidden, z, w2, whole, weights=weights).distances)


def test_parts_add_up_and_distances_count_mass_outside_the_draft_vocabulary() -> None:
    hidden, z, w2, target = random_case(1)
    weights = LossWeights(ce=0.3, soft_ce=0.2, distance=0.8)
    loss = draft_loss(hidden, z, w2, target, weights=weights)
    torch.testing.assert_close(loss.total, 0.3 * loss.ce + 0.2 * loss.soft_ce + 0.8 * loss.distance)
    torch.testing.assert_close(loss.distance, (loss.distances * target.weights).sum())
    p_draft = (hidden @ target.head.T + z @ w2.T).softmax(-1)
    p_target = torch.exp(target.hidden @ target.head.T - target.log_z[:, None])[target.index]
    overlap = torch.minimum(p_draft, p_target).sum(-1)
    torch.testing.assert_close(1 - 0.5 * loss.distances, overlap, msg="1 - TV is the chance of acceptance")


def test_a_draft_that_equals_the_target_has_no_distance() -> None:
    _, _, _, target = random_case(2)
    exact = TargetSide(
        head=target.head,
        hidden=target.hidden,
        log_z=(target.hidden @ target.head.T).logsumexp(-1),
        index=torch.arange(U),
        labels=torch.full((U,), -1),
        weights=torch.full((U,), 1 / U),
    )
    loss = draft_loss(target.hidden.clone().requires_grad_(), None, None, exact, weights=LossWeights())
    assert float(loss.total.detach()) < 1e-5
    assert bool(loss.hits.all())


def test_slot_weights_fall_by_slot_skip_missing_slots_and_sum_to_one() -> None:
    is_real = torch.tensor([[True, True, True], [True, True, False]])
    weights = slot_weights(is_real, decay_tokens=2.0).view(2, 3)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    assert weights[1, 2] == 0
    torch.testing.assert_close(weights[0, 1] / weights[0, 0], torch.exp(torch.tensor(-0.5)))


def test_confidence_loss_is_least_at_the_chance_of_acceptance() -> None:
    distances = torch.tensor([0.0, 0.4, 1.0, 2.0])
    chance = (1 - 0.5 * distances).clamp(1e-4, 1 - 1e-4)
    weights = torch.full((4,), 0.25)
    best = confidence_loss(torch.logit(chance), distances, weights)
    for shift in (-0.5, 0.5):
        assert float(confidence_loss(torch.logit(chance) + shift, distances, weights)) > float(best)
