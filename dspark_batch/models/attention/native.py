"""Attention on the native CPU kernels: norm, rotation, cache write and ragged attention in one call a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from dspark_batch.models.attention.base import AttentionContext, plan_rows
from dspark_batch.models.kernels.library import AttentionPlan, Kernels, attend
from dspark_batch.models.kv_cache import KVCache
from dspark_batch.tensors import ForwardBatch

NativeRow: TypeAlias = tuple[int, int, int, int, int]
"""num_tokens, kv_len, own_start, prefix_start, prefix_len"""


@dataclass(frozen=True, slots=True)
class NativePlan:
    """One plan per distinct sliding window."""

    by_window: dict[int | None, AttentionPlan]


class NativeAttention:
    """Attention of a model over its pool. A token's output depends on its row alone, bit for bit."""

    def __init__(self, context: AttentionContext, kernels: Kernels) -> None:
        self._context = context
        self._kernels = kernels
        self._cos, self._sin = context.rope.cos.float().contiguous(), context.rope.sin.float().contiguous()

    def plan(self, batch: ForwardBatch) -> NativePlan:
        spec, kv = self._context.spec, self._context.kv
        rows = native_rows(batch, kv)
        return NativePlan(
            {
                window: AttentionPlan(
                    self._kernels,
                    rows,
                    num_q_heads=spec.num_heads,
                    num_kv_heads=spec.num_kv_heads,
                    head_dim=spec.head_dim,
                    cache_tokens=kv.num_total_tokens,
                    scale=spec.head_dim**-0.5,
                    window=window,
                    norm_eps=spec.norm_eps,
                )
                for window in set(spec.sliding_windows)
            }
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
