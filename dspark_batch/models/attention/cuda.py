"""Attention on CUDA devices: rows of like size are padded together into one masked call, prompts go one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.attention.base import (
    AttentionContext,
    QKVWriter,
    RowPlan,
    TokenPlan,
    index_tensor,
    plan_rows,
    plan_tokens,
)
from dspark_batch.tensors import ForwardBatch

_MAX_GROUPED_TOKENS = 32
"""Rows with more new tokens than this (prompt chunks) are not padded together with others."""
_LENGTH_RATIO = 2.0
"""Within a group, the longest context is at most this many times the shortest."""


@dataclass(frozen=True, slots=True)
class _Group:
    """R rows padded to n query tokens and S seen positions.

    queries: [R, n] flat index of each query (padding repeats the row's last token). places: [R, S] pool index of each
    position (padding repeats the last). mask: [R, 1, n, S], true where seen. source: [t] index into R * n of the real
    queries; targets: [t] their flat index.
    """

    queries: Tensor
    places: Tensor
    mask: Tensor
    source: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class CudaPlan:
    tokens: TokenPlan
    groups: dict[int | None, list[_Group]]


class CudaAttention:
    """Runs on any device and dtype that torch's scaled dot-product attention supports; no device reads in a step."""

    def __init__(self, context: AttentionContext) -> None:
        self._context = context
        self._write = QKVWriter(context)
        self._windows = sorted(set(context.spec.sliding_windows), key=lambda window: window or 0)

    def plan(self, batch: ForwardBatch) -> CudaPlan:
        rows = plan_rows(batch, self._context.kv)
        device = self._context.kv.k.device
        groups = {window: [_group(part, window, device) for part in _similar(rows, window)] for window in self._windows}
        return CudaPlan(plan_tokens(rows, self._context), groups)

    def attend(self, layer: int, qkv: Tensor, plan: CudaPlan) -> Tensor:
        spec, kv = self._context.spec, self._context.kv
        query = self._write(layer, qkv, plan.tokens)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        groups = spec.num_query_groups
        for group in plan.groups[spec.sliding_windows[layer]]:
            num_rows, n = group.queries.shape
            q = query[group.queries].view(num_rows, n, spec.num_kv_heads, groups, spec.head_dim)
            # [R, n, Hkv, G, D] -> [R, Hkv, G * n, D]: the heads of a group are rows of one product
            q = q.permute(0, 2, 3, 1, 4).reshape(num_rows, spec.num_kv_heads, groups * n, spec.head_dim)
            k, v = (pool[layer][:, group.places].transpose(0, 1) for pool in (kv.k, kv.v))
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask.repeat(1, 1, groups, 1))
            y = y.view(num_rows, spec.num_kv_heads, groups, n, spec.head_dim).permute(0, 3, 1, 2, 4)
            y = y.reshape(num_rows * n, spec.num_heads, spec.head_dim)
            out.index_copy_(0, group.targets, y[group.source])
        return out.flatten(1)


def _similar(rows: Sequence[RowPlan], window: int | None) -> Iterator[list[RowPlan]]:
    """Rows in groups of like shape; long slices alone."""
    yield from ([row] for row in rows if row.num_tokens > _MAX_GROUPED_TOKENS)
    part: list[RowPlan] = []
    short = [row for row in rows if row.num_tokens <= _MAX_GROUPED_TOKENS]
    for row in sorted(short, key=lambda row: _num_seen(row, window)):
        if part and _num_seen(row, window) > _LENGTH_RATIO * _num_seen(part[0], window):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _num_seen(row: RowPlan, window: int | None) -> int:
    return row.total_len - row.window_start(window)


def _group(rows: Sequence[RowPlan], window: int | None, device: torch.device) -> _Group:
    num_rows = len(rows)
    n, seen = max(row.num_tokens for row in rows), max(_num_seen(row, window) for row in rows)
    queries: list[int] = []
    places: list[int] = []
    source: list[int] = []
    targets: list[int] = []
    starts = [row.kv_len for row in rows]
    firsts = [row.window_start(window) for row in rows]
    for r, row in enumerate(rows):
        last = row.first + row.num_tokens - 1
        queries += [*range(row.first, last + 1), *[last] * (n - row.num_tokens)]
        indices = row.pool_indices(row.window_start(window))
        places += indices + indices[-1:] * (seen - len(indices))
        source += range(r * n, r * n + row.num_tokens)
        targets += range(row.first, last + 1)
    sizes = [num_rows * n, num_rows * seen, len(source), len(source), num_rows, num_rows]
    packed = index_tensor([*queries, *places, *source, *targets, *starts, *firsts], device)
    query, place, origin, target, start, first = torch.split(packed, sizes)
    query_position = start[:, None, None] + torch.arange(n, device=device)[:, None]
    key_position = first[:, None, None] + torch.arange(seen, device=device)
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    # Padded queries lie past the row's end, so they may see the padded places; their output is dropped.
    return _Group(query.view(num_rows, n), place.view(num_rows, seen), visible.unsqueeze(1), origin, target)
