"""Attention on CPUs with torch only: one fused call per row on views of the pool, key/value heads never repeated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.attention.base import (
    AttentionContext,
    QKVWriter,
    RowPlan,
    TokenPlan,
    plan_rows,
    plan_tokens,
)
from dspark_batch.models.kv_cache import Extent
from dspark_batch.tensors import ForwardBatch

_MAX_PACKED_QUERIES = 64
"""Up to this many query rows, the heads of a group are stacked as rows of one product; above, they stay apart."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One row under one window: it sees positions ``first_seen`` on. mask: [n or G*n, seen] to add, or None."""

    row: RowPlan
    first_seen: int
    mask: Tensor | None
    causal: bool
    packed: bool


@dataclass(frozen=True, slots=True)
class CpuPlan:
    tokens: TokenPlan
    steps: dict[int | None, list[_Step]]


class CpuAttention:
    """Loops over rows; each row's keys and values are a contiguous view (or two, with a shared prefix)."""

    def __init__(self, context: AttentionContext) -> None:
        self._context = context
        self._write = QKVWriter(context)
        self._windows = sorted(set(context.spec.sliding_windows), key=lambda window: window or 0)

    def plan(self, batch: ForwardBatch) -> CpuPlan:
        rows = plan_rows(batch, self._context.kv)
        steps = {window: [self._step(row, window) for row in rows] for window in self._windows}
        return CpuPlan(plan_tokens(rows, self._context), steps)

    def attend(self, layer: int, qkv: Tensor, plan: CpuPlan) -> Tensor:
        spec, kv = self._context.spec, self._context.kv
        query = self._write(layer, qkv, plan.tokens)
        out = torch.empty(query.shape, dtype=query.dtype)
        keys, values = kv.k[layer], kv.v[layer]
        groups = spec.num_query_groups
        for step in plan.steps[spec.sliding_windows[layer]]:
            row, n = step.row, step.row.num_tokens
            flat = slice(row.first, row.first + n)
            # [n, Hq, D] -> [Hkv, G, n, D]
            q = query[flat].view(n, spec.num_kv_heads, groups, spec.head_dim).permute(1, 2, 0, 3)
            k, v = (_seen(pool, row.extent, step.first_seen, row.total_len).unsqueeze(1) for pool in (keys, values))
            if step.packed:
                q = q.reshape(spec.num_kv_heads, 1, groups * n, spec.head_dim)
            else:
                k, v = (x.expand(-1, groups, -1, -1) for x in (k, v))
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, is_causal=step.causal)
            y = y.reshape(spec.num_kv_heads, groups, n, spec.head_dim).permute(2, 0, 1, 3)
            out[flat].view(n, spec.num_kv_heads, groups, spec.head_dim).copy_(y)
        return out.flatten(1)

    def _step(self, row: RowPlan, window: int | None) -> _Step:
        groups, n = self._context.spec.num_query_groups, row.num_tokens
        first_seen = row.window_start(window)
        packed = groups * n <= _MAX_PACKED_QUERIES
        if n == 1:
            return _Step(row, first_seen, None, False, packed)
        whole = window is None or row.total_len <= window
        if row.kv_len == 0 and whole and not packed:
            return _Step(row, 0, None, True, packed)
        mask = _mask(row, first_seen, window, self._context.kv.k.dtype)
        return _Step(row, first_seen, mask.repeat(groups, 1) if packed else mask, False, packed)


def _mask(row: RowPlan, first_seen: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, seen]: 0 where token j sees a position, -inf elsewhere."""
    query = torch.arange(row.kv_len, row.total_len)[:, None]
    key = torch.arange(first_seen, row.total_len)[None, :]
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _seen(pool: Tensor, extent: Extent, first: int, end: int) -> Tensor:
    """[Hkv, N, D] -> [Hkv, end - first, D]: a view, or a copy where a shared prefix is seen too."""
    shift = extent.start - extent.prefix_len
    own = pool[:, max(first, extent.prefix_len) + shift : end + shift]
    if extent.prefix_start is None or first >= extent.prefix_len:
        return own
    shared = pool[:, extent.prefix_start + first : extent.prefix_start + extent.prefix_len]
    return torch.cat((shared, own), dim=1)
