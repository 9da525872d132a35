"""The decoder on the native CPU kernels: one call a step for all layers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.attention.native import native_rows
from dspark_batch.models.families import DecoderSpec
from dspark_batch.models.kernels.argmax import ProductArgmax
from dspark_batch.models.kernels.decoder import NativeLayer, NativeLayers, NativeShape
from dspark_batch.models.kernels.library import FALLBACK_COST, Kernels, load_kernels, why_unsupported
from dspark_batch.models.kernels.packed import PackedLinear
from dspark_batch.models.kv_cache import KVCache
from dspark_batch.models.rope import RopeTable
from dspark_batch.models.weights import DecoderWeights
from dspark_batch.tensors import ForwardBatch, ForwardOutput

logger = logging.getLogger(__name__)


class NativeDraws:
    """Fulfils ``tensors.FastDraws``."""

    def __init__(self, head: PackedLinear) -> None:
        self.product_argmax: Callable[[Tensor], tuple[Tensor, Tensor]] = ProductArgmax(head)
        self.argmax, self.draw = head.kernels.argmax, head.kernels.draw

    def greedy(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H] -> tokens [N] int64, and whether the logits were finite; the arg-max of ``NativeDecoder.logits``."""
        index, best = self.product_argmax(hidden.contiguous())
        return index.clamp_(min=0), best.isfinite()


class NativeDecoder:
    """Does what ``decoder.Decoder`` does. A token's hidden state depends on its row alone, bit for bit."""

    def __init__(
        self, spec: DecoderSpec, *, weights: DecoderWeights, kv: KVCache, rope: RopeTable, kernels: Kernels
    ) -> None:
        self.spec = spec
        self._kv = kv
        self._embedding = weights.embedding
        self._head: PackedLinear = weights.head.native(kernels)
        self.draws = NativeDraws(self._head)
        layers = [
            NativeLayer(
                input_norm=layer.input_norm,
                qkv=layer.qkv.native(kernels),
                output=layer.output.native(kernels),
                mlp_norm=layer.mlp_norm,
                gate_up=layer.gate_up.native(kernels, gated=True),
                down=layer.down.native(kernels),
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                window=window,
            )
            for layer, window in zip(weights.layers, spec.sliding_windows, strict=True)
        ]
        shape = NativeShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
        )
        self._layers = NativeLayers(
            kernels,
            shape,
            layers,
            final_norm=weights.final_norm,
            k=kv.k,
            v=kv.v,
            cos=rope.cos.float().contiguous(),
            sin=rope.sin.float().contiguous(),
        )

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Write every token's keys and values; give hidden states at ``logit_index`` and the tapped features."""
        assert all(-1 <= tap < self.spec.num_layers for tap in batch.taps), f"taps {batch.taps} name no layer"
        rows = native_rows(batch, self._kv)
        x = functional.embedding(batch.token_ids, self._embedding)
        hidden, features = self._layers.forward(x, rows, batch.logit_index.contiguous(), taps=batch.taps)
        return ForwardOutput(hidden, features)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32, the unrounded sums of products in the model's dtype."""
        return self._head(hidden.contiguous(), dtype=torch.float32)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]; drafters share the target's embedding."""
        return functional.embedding(token_ids, self._embedding)


def native_decoder(spec: DecoderSpec, *, weights: DecoderWeights, kv: KVCache, rope: RopeTable) -> NativeDecoder | None:
    """None where the kernels cannot be had or do not know the device, the dtype or a width of the model."""
    q_width = spec.num_heads * spec.head_dim
    widths = (spec.hidden_size, spec.intermediate_size, q_width)
    device = kv.k.device
    reason = why_unsupported(dtype=kv.k.dtype, device=device, widths=widths, head_dim=spec.head_dim)
    if reason is not None:
        if device.type == "cpu":
            logger.warning("native kernels do not run this model, torch does (%s): %s", FALLBACK_COST, reason)
        return None
    kernels = load_kernels()
    if kernels is None:
        return None
    return NativeDecoder(spec, weights=weights, kv=kv, rope=rope, kernels=kernels)
