"""The losses of a drafter, computed with their gradients in chunks, so that no [slots, vocabulary] tensor is kept.

Source: arXiv 2607.05147, training: 0.1 CE + 0.9 Σ|p_d - p_t| + 1.0 BCE(confidence, 1 - ½ Σ|p_d - p_t|), slot k weighing
exp(-(k-1)/γ). Beside them stands -Σ p_t log p_d, the cross-entropy with the target's whole distribution: the gradient
of Σ|p_d - p_t| vanishes where the draft gives the target's token no mass, this one's does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Of the parts of the loss. decay_tokens: slot k weighs exp(-(k-1)/this). reach: the part of a slot's weight that
    goes with its chance to be reached, the product of 1 - ½ Σ|p_d - p_t| over the slots before it in the block; it is
    not differentiated."""

    ce: float = 0.1
    soft_ce: float = 0.0
    distance: float = 0.9
    confidence: float = 1.0
    decay_tokens: float = 5.0
    reach: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class TargetSide:
    """What the target says, over a draft vocabulary of Vd tokens.

    head: [Vd, H], frozen. hidden: [U, H], the target's final output at U positions. log_z: [U] float32, log of the sum
    of exponentials over its whole vocabulary; None to take the draft vocabulary for the whole. index: [N] which of the
    U each slot is compared with. labels: [N] draft columns of the true tokens, -1 where it cannot be drafted. weights:
    [N] float32, summing to 1; 0 drops a slot. slots_per_block: slots in a row that are one block.
    """

    head: Tensor
    hidden: Tensor
    log_z: Tensor | None
    index: Tensor
    labels: Tensor
    weights: Tensor
    slots_per_block: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class DraftLoss:
    """total: scalar that can be differentiated; ce, soft_ce and distance are its parts. distances: [N] Σ|p_d - p_t|,
    with the target's mass outside the draft vocabulary counted. hits: [N] whether the draft's best token is the
    target's."""

    total: Tensor
    ce: Tensor
    soft_ce: Tensor
    distance: Tensor
    distances: Tensor
    hits: Tensor


def draft_loss(
    hidden: Tensor, bias_input: Tensor | None, w2: Tensor | None, target: TargetSide, *, weights: LossWeights
) -> DraftLoss:
    """Loss of the logits ``hidden @ head.T + bias_input @ w2.T``.

    hidden: [N, H]; bias_input: [N, r]; w2: [Vd, r]; None without a sequential head. Gradients reach all three.
    """
    inputs, matrix = hidden, target.head
    if bias_input is not None and w2 is not None:
        # Both products in one: [h; z] @ [head; w2].T.
        inputs, matrix = torch.cat((hidden, bias_input), dim=1), torch.cat((target.head, w2.detach()), dim=1)
    total, parts, distances, hits = _fused(inputs, w2, matrix, target, weights)
    ce, soft_ce, distance = parts
    return DraftLoss(total, ce, soft_ce, distance, distances, hits)


def confidence_loss(logits: Tensor, distances: Tensor, weights: Tensor) -> Tensor:
    """Weighted BCE of [N] confidence logits against the chance of acceptance 1 - distances / 2."""
    chance = (1.0 - 0.5 * distances).clamp(0.0, 1.0)
    loss = functional.binary_cross_entropy_with_logits(logits.float(), chance, reduction="none")
    return (loss * weights).sum()


def slot_weights(is_real: Tensor, *, decay_tokens: float) -> Tensor:
    """[A, γ] bool -> [A * γ] float32: exp(-(k-1)/decay_tokens) for real slots, scaled to sum to 1."""
    decay = torch.exp(-torch.arange(is_real.shape[1], device=is_real.device) / decay_tokens)
    weights = is_real * decay
    return (weights / weights.sum().clamp_min(1e-12)).flatten()


class _Fused(torch.autograd.Function):
    """The losses are sums over slots, so their gradients are known in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, w2: Tensor | None, matrix: Tensor, target: TargetSide, weights: LossWeights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        said = _said(target)
        num_slots, width = inputs.shape[0], target.head.shape[1]
        distances = torch.zeros(num_slots, device=inputs.device)
        hits = torch.zeros(num_slots, dtype=torch.bool, device=inputs.device)
        parts = torch.zeros(3, device=inputs.device)
        grad_inputs = torch.empty_like(inputs)
        grad_w2 = None if w2 is None else torch.zeros_like(w2, dtype=torch.float32)
        blocks_at_once = _CHUNK_ELEMENTS[inputs.device.type] // (matrix.shape[0] * target.slots_per_block)
        size = max(1, blocks_at_once) * target.slots_per_block
        for first in range(0, num_slots, size):
            part = slice(first, first + size)
            x = inputs[part]
            chunk = _chunk((x @ matrix.T).float(), said, target, part, weights)
            distances[part], hits[part] = chunk.distance, chunk.hit
            parts += torch.stack((chunk.ce, chunk.soft_ce, chunk.distance)) @ chunk.weight
            gradient = chunk.gradient.to(inputs.dtype)
            grad_inputs[part] = gradient @ matrix
            if grad_w2 is not None:
                grad_w2 += (gradient.T @ x[:, width:]).float()
        ctx.gradients = grad_inputs, None if grad_w2 is None or w2 is None else grad_w2.to(w2.dtype)
        ctx.mark_non_differentiable(parts, distances, hits)
        total = parts @ parts.new_tensor((weights.ce, weights.soft_ce, weights.distance))
        return total, parts, distances, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        return (*(None if g is None else g * scale.to(g.dtype) for g in ctx.gradients), None, None, None)


_fused: Any = _Fused.apply


@dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """Of the target at U positions: probs [U, Vd] float32, best [U] its best draft column, mass [U] of the draft
    vocabulary."""

    probs: Tensor
    best: Tensor
    mass: Tensor


def _said(target: TargetSide) -> _Said:
    logits = (target.hidden @ target.head.T).float()
    probs = logits.softmax(-1) if target.log_z is None else logits.sub_(target.log_z[:, None]).exp_()
    return _Said(probs, probs.argmax(-1), probs.sum(-1))


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Per slot of a chunk, and the gradient [n, Vd] by the logits of the sum of the losses, weighted by ``weight``."""

    weight: Tensor
    ce: Tensor
    soft_ce: Tensor
    distance: Tensor
    hit: Tensor
    gradient: Tensor


def _chunk(logits: Tensor, said: _Said, target: TargetSide, part: slice, weights: LossWeights) -> _Chunk:
    """Passes over [n, Vd] are what this costs, so there are few and the last ones are in place."""
    index, labels = target.index[part], target.labels[part]
    best = logits.argmax(-1, keepdim=True)
    p_draft, p_target, mass = torch.softmax(logits, dim=-1), said.probs[index], said.mass[index]
    log_z = (logits.gather(1, best) - p_draft.gather(1, best).log()).squeeze(1)
    has_label = labels >= 0
    label = labels.clamp_min(0)[:, None]
    ce = (log_z - logits.gather(1, label).squeeze(1)) * has_label
    soft_ce = log_z * mass - torch.linalg.vecdot(p_target, logits)
    difference = torch.sub(p_draft, p_target, out=logits)
    distance = torch.linalg.vector_norm(difference, ord=1, dim=-1) + (1.0 - mass).clamp_min(0.0)
    slot_weight = target.weights[part] * _reach(distance, target.slots_per_block, weights.reach)
    # dCE/dlogits = p_d - onehot; dsoft/dlogits = mass p_d - p_t; d|p_d - p_t|/dlogits = p_d (s - Σ p_d s).
    factor = weights.ce * has_label + weights.soft_ce * mass
    if weights.distance:
        sign = difference.sign_()
        factor = factor[:, None] + weights.distance * sign.sub_(torch.linalg.vecdot(p_draft, sign)[:, None])
        gradient = p_draft.mul_(factor.mul_(slot_weight[:, None]))
    else:
        gradient = p_draft.mul_((factor * slot_weight)[:, None])
    if weights.soft_ce:
        gradient.addcmul_(p_target, (-weights.soft_ce * slot_weight)[:, None])
    gradient.scatter_add_(1, label, -(weights.ce * has_label * slot_weight)[:, None])
    return _Chunk(slot_weight, ce, soft_ce, distance, best.squeeze(1) == said.best[index], gradient)


def _reach(distances: Tensor, slots_per_block: int, share: float) -> Tensor:
    """[N] distances of whole blocks -> [N] factors of the slots' weights."""
    stands = (1.0 - 0.5 * distances).clamp(0.0, 1.0).view(-1, slots_per_block)
    reached = functional.pad(stands[:, :-1].cumprod(dim=1), (1, 0), value=1.0)
    return (1.0 - share + share * reached).flatten()


def reference_loss(logits: Tensor, target: TargetSide, *, weights: LossWeights) -> Tensor:
    """The slow oracle of :func:`draft_loss`, by plain automatic differentiation over full [N, Vd] logits."""
    said = target.hidden @ target.head.T
    log_z = said.logsumexp(-1) if target.log_z is None else target.log_z
    p_target = torch.exp(said - log_z[:, None])[target.index]
    p_draft = torch.softmax(logits, dim=-1)
    distance = (p_draft - p_target).abs().sum(-1) + (1.0 - p_target.sum(-1)).clamp_min(0.0)
    known = target.labels >= 0
    ce = functional.cross_entropy(logits, target.labels.clamp_min(0), reduction="none") * known
    soft_ce = -(p_target * torch.log_softmax(logits, dim=-1)).sum(-1)
    slot_weights = target.weights.clone()
    for slot in range(len(slot_weights)):
        first = slot - slot % target.slots_per_block
        reached = float(torch.prod(1.0 - 0.5 * distance[first:slot].detach()))
        slot_weights[slot] *= 1.0 - weights.reach + weights.reach * reached
    return (slot_weights * (weights.ce * ce + weights.soft_ce * soft_ce + weights.distance * distance)).sum()
