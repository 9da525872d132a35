"""The target model as the engine sees it: flat forwards over its own KV pool."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_batch.models.attention import select_backend
from dspark_batch.models.attention.base import AttentionContext
from dspark_batch.models.decoder import Decoder
from dspark_batch.models.families import DecoderSpec
from dspark_batch.models.kv_cache import KVCache
from dspark_batch.models.native import NativeDecoder, native_decoder
from dspark_batch.models.ops import Ops, TorchOps
from dspark_batch.models.rope import rope_table
from dspark_batch.models.weights import DecoderWeights
from dspark_batch.tensors import FastDraws, ForwardBatch, ForwardOutput


class TargetRunner:
    """Fulfils ``tensors.Target``.

    attention: name of a backend (``models.attention.BACKENDS``) under the torch decoder; None picks the fastest way for
    the device: on CPUs the native kernels where they can be had, else torch.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        weights: DecoderWeights,
        kv: KVCache,
        max_context: int | None = None,
        attention: str | None = None,
        ops: Ops | None = None,
    ) -> None:
        self._max_context = min(spec.max_context, max_context or spec.max_context)
        self._kv = kv
        rope = rope_table(
            spec.rope,
            head_dim=spec.head_dim,
            num_positions=self._max_context,
            dtype=kv.k.dtype,
            device=kv.k.device,
        )
        native = native_decoder(spec, weights=weights, kv=kv, rope=rope) if attention is None and ops is None else None
        if native is not None:
            self.decoder: Decoder | NativeDecoder = native
            return
        q_norms = [layer.q_norm for layer in weights.layers if layer.q_norm is not None]
        k_norms = [layer.k_norm for layer in weights.layers if layer.k_norm is not None]
        context = AttentionContext(spec=spec, kv=kv, rope=rope, q_norms=q_norms or None, k_norms=k_norms or None)
        backend = select_backend(context, name=attention)
        self.decoder = Decoder(spec, weights=weights, attention=backend, ops=ops or TorchOps())

    @property
    def spec(self) -> DecoderSpec:
        return self.decoder.spec

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def device(self) -> torch.device:
        return self._kv.k.device

    @property
    def dtype(self) -> torch.dtype:
        return self._kv.k.dtype

    @property
    def kv(self) -> KVCache:
        return self._kv

    @property
    def fast_draws(self) -> FastDraws | None:
        return self.decoder.draws if isinstance(self.decoder, NativeDecoder) else None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Write the KV of every flat token, and give hidden states and features where asked."""
        return self.decoder.forward(batch)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32. Callers chunk over N."""
        return self.decoder.logits(hidden)
