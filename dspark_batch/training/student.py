"""The drafter in training: float32 weights, one differentiable pass over a packed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.drafters.dspark.backbone import Backbone
from dspark_batch.drafters.dspark.checkpoint import expected_shapes
from dspark_batch.drafters.dspark.confidence_head import confidence_head
from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.drafters.dspark.markov_head import MarkovHead, markov_head
from dspark_batch.drafters.dspark.target_parts import LinearOp
from dspark_batch.models.rope import rope_table
from dspark_batch.models.rope_spec import rope_spec
from dspark_batch.training.attention import PackedAttention
from dspark_batch.training.initial import draft_columns
from dspark_batch.training.losses import (
    DraftLoss,
    LossWeights,
    TargetSide,
    confidence_loss,
    draft_loss,
    slot_weights,
)
from dspark_batch.training.packing import PackedBlocks
from dspark_batch.training.teacher import TaughtRow, Teacher

_W2 = "markov_head.markov_w2.weight"


@dataclass(frozen=True, slots=True, eq=False)
class StepLoss:
    """total: scalar to differentiate. ce, soft_ce, distance, confidence: its parts. acceptance: [γ] mean of
    1 - ½ Σ|p_d - p_t| per slot; hits: [γ] share of slots whose best token is the target's. Slots that the batch leaves
    out have 0 there."""

    total: Tensor
    ce: Tensor
    soft_ce: Tensor
    distance: Tensor
    confidence: Tensor
    acceptance: Tensor
    hits: Tensor


class Student:
    """All of a drafter's own tensors as float32 parameters; the target's embedding and head stay frozen.

    token_ids: [Vd] target tokens of a reduced draft vocabulary, increasing; None for all. dtype: of the products.
    """

    def __init__(
        self,
        config: DSparkConfig,
        tensors: Mapping[str, Tensor],
        teacher: Teacher,
        *,
        token_ids: Tensor | None,
        max_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        assert config.sample_from_anchor, "blocks of DFlash are not trained"
        assert tensors.keys() == expected_shapes(config).keys(), "a tensor is missing or unknown"
        self.config, self.token_ids = config, None if token_ids is None else token_ids.to(teacher.device)
        self.dtype, self.device = dtype, teacher.device
        self.parameters = {
            name: tensor.detach().to(teacher.device, torch.float32).clone().requires_grad_()
            for name, tensor in tensors.items()
        }
        self._teacher = teacher
        self._head = teacher.head_rows(self.token_ids).to(dtype)
        self._columns = draft_columns(config.vocab_size, self.token_ids).to(teacher.device)
        spec, _ = rope_spec(config.rope, where="the drafter's config")
        table = rope_table(
            spec,
            head_dim=config.head_dim,
            num_positions=max_tokens + config.block_size,
            dtype=dtype,
            device=teacher.device,
        )
        self._cos, self._sin = table.cos, table.sin

    def loss(self, batch: PackedBlocks, taught: Sequence[TaughtRow], *, weights: LossWeights) -> StepLoss:
        """The three losses of a batch. ``taught[s]`` belongs to span s."""
        config, device = self.config, self.device
        cast = {name: parameter.to(self.dtype) for name, parameter in self.parameters.items()}
        hidden = self._hidden(batch, taught, cast)
        previous = torch.from_numpy(batch.previous_ids).to(device)
        embedded, bias_input = self._sequential(cast, previous, hidden)
        is_real = torch.from_numpy(batch.is_real).to(device)
        per_slot = slot_weights(is_real, decay_tokens=weights.decay_tokens)
        target = self._target_side(batch, taught, per_slot)
        flat = hidden.flatten(0, 1)
        drafted = draft_loss(flat, bias_input.flatten(0, 1), cast[_W2], target, weights=weights)
        head = confidence_head(config, cast)
        confidence = drafted.total.new_zeros(())
        if head is not None:
            confidence = confidence_loss(head.logits(hidden, embedded).flatten(), drafted.distances, per_slot)
        return self._step_loss(drafted, confidence, is_real, weights)

    def hidden_of(self, batch: PackedBlocks, taught: Sequence[TaughtRow]) -> Tensor:
        """[A, γ, H], the backbone's output, for tests."""
        cast = {name: parameter.to(self.dtype) for name, parameter in self.parameters.items()}
        return self._hidden(batch, taught, cast)

    def _hidden(self, batch: PackedBlocks, taught: Sequence[TaughtRow], cast: Mapping[str, Tensor]) -> Tensor:
        config, device = self.config, self.device
        backbone = Backbone(config, cast, linear=_dense)
        features = torch.cat([t.features[: s.num_tokens] for t, s in zip(taught, batch.spans, strict=True)])
        places = torch.from_numpy(np.concatenate([np.arange(span.num_tokens) for span in batch.spans])).to(device)
        k, v = backbone.context(features.to(self.dtype), self._cos[places], self._sin[places])
        anchors = torch.from_numpy(batch.anchors)
        num_blocks, size = batch.is_real.shape
        token_ids = torch.full((num_blocks, size), config.mask_token_id, dtype=torch.int64, device=device)
        token_ids[:, 0] = torch.from_numpy(batch.anchor_ids).to(device)
        x = self._teacher.embed(token_ids.flatten()).to(self.dtype)
        positions = (anchors[:, None] + torch.arange(size)).flatten().to(device)
        attend = PackedAttention(batch.spans, anchors, k, v, block_size=size)
        return backbone.blocks(x, self._cos[positions], self._sin[positions], attend).view(num_blocks, size, -1)

    def _sequential(self, cast: Mapping[str, Tensor], previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """W1[x] of the true previous tokens, and what W2 multiplies; both [A, γ, r]."""
        w2 = cast[_W2]

        def linear(weight: Tensor, *, float32: bool = False) -> LinearOp:
            # The product with W2 is part of the fused loss.
            return (lambda x: x) if weight is w2 else _dense(weight, float32=float32)

        head: MarkovHead | None = markov_head(self.config, cast, linear=linear)
        assert head is not None, "a DSpark drafter has a sequential head"
        embedded, state, inputs = head.embed(previous), None, []
        for slot in range(previous.shape[1]):
            bias_input, state = head.bias(embedded[:, slot], hidden[:, slot], state)
            inputs.append(bias_input)
        return embedded, torch.stack(inputs, dim=1)

    def _target_side(self, batch: PackedBlocks, taught: Sequence[TaughtRow], weights: Tensor) -> TargetSide:
        index = [torch.from_numpy(p).to(self.device) - t.first for p, t in zip(batch.positions, taught, strict=True)]
        log_z = [t.log_z[i] for t, i in zip(taught, index, strict=True) if t.log_z is not None]
        return TargetSide(
            head=self._head,
            hidden=torch.cat([t.hidden[i] for t, i in zip(taught, index, strict=True)]).to(self.dtype),
            # Rows with and without it in one batch are alike.
            log_z=torch.cat(log_z) if len(log_z) == len(taught) else None,
            index=torch.from_numpy(batch.target_index).to(self.device).flatten(),
            labels=self._columns[torch.from_numpy(batch.target_ids).to(self.device)].flatten(),
            weights=weights,
            slots_per_block=batch.is_real.shape[1],
        )

    def _step_loss(self, drafted: DraftLoss, confidence: Tensor, is_real: Tensor, weights: LossWeights) -> StepLoss:
        counts = is_real.sum(0).clamp_min(1)
        chance = (1.0 - 0.5 * drafted.distances).view(is_real.shape) * is_real
        hits = drafted.hits.view(is_real.shape) & is_real
        missing = (0, self.config.block_size - is_real.shape[1])
        return StepLoss(
            total=drafted.total + weights.confidence * confidence,
            ce=drafted.ce,
            soft_ce=drafted.soft_ce,
            distance=drafted.distance,
            confidence=confidence.detach(),
            acceptance=functional.pad(chance.sum(0) / counts, missing),
            hits=functional.pad(hits.sum(0) / counts, missing),
        )


def _dense(weight: Tensor, *, float32: bool = False) -> LinearOp:
    return lambda x: functional.linear(x, weight)
