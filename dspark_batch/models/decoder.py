"""One lean decoder for Llama, Mistral, Qwen2 and Qwen3 over flat tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.attention.base import AttentionBackend
from dspark_batch.models.families import DecoderSpec
from dspark_batch.models.ops import Ops
from dspark_batch.models.weights import DecoderWeights, LayerWeights
from dspark_batch.tensors import ForwardBatch, ForwardOutput


class Decoder:
    """The layers of one checkpoint. Holds no state of rows; the attention backend does."""

    def __init__(
        self, spec: DecoderSpec, *, weights: DecoderWeights, attention: AttentionBackend[Any], ops: Ops
    ) -> None:
        self.spec = spec
        self._weights = weights
        self._attention = attention
        self._ops = ops

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Write every token's keys and values; give hidden states at ``logit_index`` and the tapped features."""
        last = self.spec.num_layers - 1
        _check_taps(batch.taps, last)
        eps, layers, ops = self.spec.norm_eps, self._weights.layers, self._ops
        plan = self._attention.plan(batch)
        residual = functional.embedding(batch.token_ids, self._weights.embedding)
        tapped: dict[int, Tensor] = {-1: residual} if -1 in batch.taps else {}
        x = ops.rms_norm(residual, layers[0].input_norm, eps)
        for index, layer in enumerate(layers):
            x = self._attention.attend(index, layer.qkv(x), plan)
            # Past the last layer's cache write, only tokens that are asked for are worth computing.
            if index == last and last not in batch.taps:
                x, residual = x[batch.logit_index], residual[batch.logit_index]
            x, residual = self._finish_layer(layer, x, residual)
            if index in batch.taps:
                tapped[index] = residual + x
            if index < last:
                x, residual = ops.add_rms_norm(x, residual, layers[index + 1].input_norm, eps)
        if last in batch.taps:
            x, residual = x[batch.logit_index], residual[batch.logit_index]
        hidden, _ = ops.add_rms_norm(x, residual, self._weights.final_norm, eps)
        features = torch.cat([tapped[k] for k in batch.taps], dim=-1) if batch.taps else None
        return ForwardOutput(hidden, features)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32, computed in the model's dtype."""
        return self._weights.head(hidden).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]; drafters share the target's embedding."""
        return functional.embedding(token_ids, self._weights.embedding)

    def _finish_layer(self, layer: LayerWeights, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and MLP; the layer's output is residual + x, added by the next norm."""
        x, residual = self._ops.add_rms_norm(layer.output(attended), residual, layer.mlp_norm, self.spec.norm_eps)
        return layer.down(self._ops.silu_mul(layer.gate_up(x))), residual


def _check_taps(taps: Collection[int], last: int) -> None:
    for tap in taps:
        assert -1 <= tap <= last, f"tap {tap} is no layer of a decoder whose last layer is {last}"
