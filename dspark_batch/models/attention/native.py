"""Attention on the native CPU kernels: norm, rotation, cache write and ragged attention in one call a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dspark_batch.models.attention.base import AttentionContext, plan_rows
from dspark_batch.models.kernels.library import AttentionPlan, AttentionShape, Kernels, NativeRow, attend
from dspark_batch.models.kv_cache import KVCache
from dspark_batch.tensors import ForwardBatch


@dataclass(frozen=True, slots=True)
class NativePlan:
    """One plan per distinct sliding window."""

    by_window: dict[int | None, AttentionPlan]


class NativeAttention:
    """Attention of a model over its pool. A token's output depends on its row alone, bit for bit."""

    def __init__(self, context: AttentionContext, kernels: Kernels) -> None:
        self._context = context
        self._kernels = kernels
        spec = context.spec
        self._shape = AttentionShape(
            num_q_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            cache_tokens=context.kv.num_total_tokens,
            norm_eps=spec.norm_eps,
        )
        self._cos, self._sin = context.rope.cos.float().contiguous(), context.rope.sin.float().contiguous()

    def plan(self, batch: ForwardBatch) -> NativePlan:
        rows = native_rows(batch, self._context.kv)
        windows = set(self._context.spec.sliding_windows)
        return NativePlan(
            {window: AttentionPlan(self._kernels, rows, self._shape, window=window) for window in windows}
        )

    def attend(self, layer: int, qkv: Tensor, plan: NativePlan) -> Tensor:
        context, spec = self._context, self._context.spec
        out = qkv.new_empty((qkv.shape[0], spec.num_heads * spec.head_dim))
        attend(
            self._kernels,
            plan.by_window[spec.sliding_windows[layer]],
            qkv.contiguous(),
            cos=self._cos,
            sin=self._sin,
            k=context.kv.k[layer],
            v=context.kv.v[layer],
            out=out,
            q_norm=None if context.q_norms is None else context.q_norms[layer],
            k_norm=None if context.k_norms is None else context.k_norms[layer],
        )
        return out


def native_rows(batch: ForwardBatch, kv: KVCache) -> list[NativeRow]:
    """The batch's rows as the kernels want them."""
    return [
        (row.num_tokens, row.kv_len, row.extent.start, row.extent.prefix_start or 0, row.extent.prefix_len)
        for row in plan_rows(batch, kv)
    ]
