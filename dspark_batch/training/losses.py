"""The losses of a drafter, computed with their gradients in chunks, so that no [slots, vocabulary] tensor is kept.

Source: arXiv 2607.05147, training: 0.1 CE + 0.9 Σ|p_d - p_t| + 1.0 BCE(confidence, 1 - ½ Σ|p_d - p_t|), slot k weighing
exp(-(k-1)/γ).
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
    ce: float = 0.1
    distance: float = 0.9
    confidence: float = 1.0
    decay_tokens: float = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class TargetSide:
    """What the target says, over a draft vocabulary of Vd tokens.

    head: [Vd, H], frozen. hidden: [U, H], the target's final output at U positions. log_z: [U] float32, log of the sum
    of exponentials over its whole vocabulary. index: [N] which of the U each slot is compared with. labels: [N] draft
    columns of the true tokens, -1 where it cannot be drafted. weights: [N] float32, summing to 1; 0 drops a slot.
    """

    head: Tensor
    hidden: Tensor
    log_z: Tensor
    index: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DraftLoss:
    """total: scalar that can be differentiated; ce and distance are its parts. distances: [N] Σ|p_d - p_t|, with the
    target's mass outside the draft vocabulary counted. hits: [N] whether the draft's best token is the target's."""

    total: Tensor
    ce: Tensor
    distance: Tensor
    distances: Tensor
    hits: Tensor


def draft_loss(
    hidden: Tensor, bias_input: Tensor | None, w2: Tensor | None, target: TargetSide, *, weights: LossWeights
) -> DraftLoss:
    """Loss of the logits ``hidden @ head.T + bias_input @ w2.T``.

    hidden: [N, H]; bias_input: [N, r]; w2: [Vd, r]; None without a sequential head. Gradients reach all three.
    """
    total, ce, distance, distances, hits = _fused(hidden, bias_input, w2, target, weights)
    return DraftLoss(total, ce, distance, distances, hits)


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
    """Both losses are sums over slots, so their gradients are known in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, bias_input: Tensor | None, w2: Tensor | None, target: TargetSide, weights: LossWeights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        target_log_probs = (target.hidden @ target.head.T).float() - target.log_z[:, None]
        num_slots = hidden.shape[0]
        distances = torch.zeros(num_slots, device=hidden.device)
        hits = torch.zeros(num_slots, dtype=torch.bool, device=hidden.device)
        ce_total, distance_total = torch.zeros(2, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_bias = None if bias_input is None else torch.empty_like(bias_input)
        grad_w2 = None if w2 is None else torch.zeros_like(w2, dtype=torch.float32)
        size = max(1, _CHUNK_ELEMENTS[hidden.device.type] // target.head.shape[0])
        for first in range(0, num_slots, size):
            part = slice(first, first + size)
            x = hidden[part]
            z = None if bias_input is None else bias_input[part]
            logits = (x @ target.head.T).float()
            if z is not None and w2 is not None:
                logits += (z @ w2.T).float()
            chunk = _chunk(logits, target_log_probs[target.index[part]], target.labels[part], weights)
            slot_weight = target.weights[part]
            distances[part], hits[part] = chunk.distance, chunk.hit
            ce_total += (chunk.ce * slot_weight).sum()
            distance_total += (chunk.distance * slot_weight).sum()
            gradient = (chunk.gradient * slot_weight[:, None]).to(hidden.dtype)
            grad_hidden[part] = gradient @ target.head
            if grad_bias is not None and grad_w2 is not None and z is not None and w2 is not None:
                grad_bias[part] = gradient @ w2
                grad_w2 += (gradient.T @ z).float()
        ctx.gradients = (grad_hidden, grad_bias, None if grad_w2 is None or w2 is None else grad_w2.to(w2.dtype))
        ctx.mark_non_differentiable(ce_total, distance_total, distances, hits)
        total = weights.ce * ce_total + weights.distance * distance_total
        return total, ce_total, distance_total, distances, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        scaled = [None if g is None else g * scale.to(g.dtype) for g in ctx.gradients]
        return (*scaled, None, None)


_fused: Any = _Fused.apply


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Per slot of a chunk, and the gradient [n, Vd] by the logits of the weighted sum of both losses."""

    ce: Tensor
    distance: Tensor
    hit: Tensor
    gradient: Tensor


def _chunk(logits: Tensor, target_log_probs: Tensor, labels: Tensor, weights: LossWeights) -> _Chunk:
    hit = logits.argmax(-1) == target_log_probs.argmax(-1)
    log_z = logits.logsumexp(-1, keepdim=True)
    p_draft, p_target = torch.exp(logits - log_z), torch.exp(target_log_probs)
    has_label = labels >= 0
    label = labels.clamp_min(0)[:, None]
    ce = (log_z - logits.gather(1, label)).squeeze(1) * has_label
    difference = p_draft - p_target
    outside = (1.0 - p_target.sum(-1)).clamp_min(0.0)
    distance = difference.abs().sum(-1) + outside
    sign = difference.sign_()
    mean_sign = (p_draft * sign).sum(-1, keepdim=True)
    # d|p_d - p_t|/dlogits = p_d (s - Σ p_d s); dCE/dlogits = p_d - onehot
    factor = sign.sub_(mean_sign).mul_(weights.distance).add_(weights.ce * has_label[:, None])
    gradient = factor.mul_(p_draft)
    gradient.scatter_add_(1, label, -(weights.ce * has_label)[:, None].to(gradient.dtype))
    return _Chunk(ce, distance, hit, gradient)


def reference_loss(logits: Tensor, target: TargetSide, *, weights: LossWeights) -> Tensor:
    """The slow oracle of :func:`draft_loss`, by plain automatic differentiation over full [N, Vd] logits."""
    p_target = torch.exp((target.hidden @ target.head.T) - target.log_z[:, None])[target.index]
    p_draft = torch.softmax(logits, dim=-1)
    distance = (p_draft - p_target).abs().sum(-1) + (1.0 - p_target.sum(-1)).clamp_min(0.0)
    known = target.labels >= 0
    ce = functional.cross_entropy(logits, target.labels.clamp_min(0), reduction="none") * known
    return (target.weights * (weights.ce * ce + weights.distance * distance)).sum()
