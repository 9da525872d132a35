"""Attention of blocks to their rows' context and to themselves, over ragged rows of the context cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.drafters.dspark.context_cache import ContextCache, RowContext, SpanWriter

_LENGTH_RATIO = 1.5
"""Rows are padded to a common length only with rows at most this much shorter."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Pool tokens first .. end-1 that a row's block sees; the block itself is the last of them."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of like length. rows: [G] int64. places: [G, S] pool tokens, the padding a valid one.
    visible: [G, 1, B, S]."""

    rows: Tensor
    places: Tensor
    visible: Tensor


class BlockAttention:
    """An ``Attend`` for one round over R rows with blocks of B slots.

    The block's keys and values are written just behind the row's context, where they are dead again afterwards. With
    ``rowwise`` each row attends on a view of its own memory (fast on CPUs); otherwise rows of like length are gathered
    and padded (few launches on a GPU).
    """

    def __init__(
        self, config: DSparkConfig, cache: ContextCache, rows: Sequence[RowContext], *, rowwise: bool | None = None
    ) -> None:
        self._config, self._cache, self._rows = config, cache, rows
        self._size = config.block_size
        device = cache.k.device
        self._writer = SpanWriter([(row.start + row.length, self._size) for row in rows], device)
        self._rowwise = device.type == "cpu" if rowwise is None else rowwise
        self._spans = {window: [self._span(row, window) for row in rows] for window in set(config.layer_windows)}
        self._groups: dict[int | None, list[_Group]] = {}
        if not self._rowwise:
            self._groups = {window: self._grouped(window) for window in self._spans}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._cache.k[layer], self._cache.v[layer]
        self._writer.write(keys, k.transpose(0, 1))
        self._writer.write(values, v.transpose(0, 1))
        config, window = self._config, self._config.layer_windows[layer]
        shape = (len(self._rows), self._size, config.num_kv_heads, -1, config.head_dim)
        # [R, B, Hkv, G, D] -> [R, Hkv, G * B, D]: the heads of a group are rows of one product.
        packed = q.view(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)
        y = self._by_row(packed, keys, values, window) if self._rowwise else self._padded(packed, keys, values, window)
        y = y.view(*y.shape[:2], -1, self._size, config.head_dim).permute(0, 3, 1, 2, 4)
        return y.reshape(len(self._rows) * self._size, -1)

    def _by_row(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        out = torch.empty_like(q)
        for r, span in enumerate(self._spans[window]):
            k, v = keys[None, :, span.first : span.end], values[None, :, span.first : span.end]
            mask = self._mask(span, q.dtype) if self._is_causal(window) else None
            out[r] = functional.scaled_dot_product_attention(q[r : r + 1], k, v, attn_mask=mask)[0]
        return out

    def _padded(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        out = torch.empty_like(q)
        num_groups = q.shape[2] // self._size
        for group in self._groups[window]:
            k, v = (pool[:, group.places].transpose(0, 1) for pool in (keys, values))
            visible = group.visible.repeat(1, 1, num_groups, 1)
            out[group.rows] = functional.scaled_dot_product_attention(q[group.rows], k, v, attn_mask=visible)
        return out

    def _span(self, row: RowContext, window: int | None) -> _Span:
        hidden = 0 if window is None else max(0, row.length - window)
        return _Span(row.start + hidden, row.start + row.length + self._size)

    def _is_causal(self, window: int | None) -> bool:
        return window is not None and self._config.causal_windows

    def _mask(self, span: _Span, dtype: torch.dtype) -> Tensor:
        """[G * B, S] to add: 0, and -inf to the right of a slot."""
        block = torch.full((self._size, self._size), float("-inf"), dtype=dtype).triu_(1)
        mask = functional.pad(block, (span.end - span.first - self._size, 0))
        return mask.repeat(self._config.num_heads // self._config.num_kv_heads, 1)

    def _grouped(self, window: int | None) -> list[_Group]:
        spans = self._spans[window]
        order = sorted(range(len(spans)), key=lambda r: spans[r].end - spans[r].first)
        groups: list[list[int]] = []
        for r in order:
            size = spans[r].end - spans[r].first
            if not groups or size > _LENGTH_RATIO * (spans[groups[-1][0]].end - spans[groups[-1][0]].first):
                groups.append([])
            groups[-1].append(r)
        return [self._group(rows, window) for rows in groups]

    def _group(self, rows: list[int], window: int | None) -> _Group:
        device = self._cache.k.device
        spans = [self._spans[window][r] for r in rows]
        packed = torch.tensor([rows, [s.first for s in spans], [s.end for s in spans]]).to(device)
        index, first, end = packed[0], packed[1, :, None], packed[2, :, None]
        longest = max(span.end - span.first for span in spans)
        places = first + torch.arange(longest, device=device)
        visible = (places < end)[:, None, None].expand(-1, 1, self._size, -1)
        if self._is_causal(window):
            slots = end - self._size + torch.arange(self._size, device=device)
            visible = visible & (places[:, None, None] <= slots[:, None, :, None])
        return _Group(index, places.minimum(end - 1), visible)
