"""What an attention backend is, and the steps that all torch backends share: split, head norms, RoPE, cache write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.families import DecoderSpec
from dspark_batch.models.kv_cache import Extent, KVCache
from dspark_batch.models.rope import RopeTable
from dspark_batch.tensors import ForwardBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionContext:
    """What every backend is built from. q_norms, k_norms: per layer [D], or None without head norms."""

    spec: DecoderSpec
    kv: KVCache
    rope: RopeTable
    q_norms: Sequence[Tensor] | None = None
    k_norms: Sequence[Tensor] | None = None


PlanT = TypeVar("PlanT")


class AttentionBackend(Protocol[PlanT]):
    """Attention of one model over its KV pool. ``plan`` runs once a step, ``attend`` once a layer."""

    def plan(self, batch: ForwardBatch) -> PlanT:
        """Everything that depends only on the rows, as device tensors. Reads nothing from the device."""
        ...

    def attend(self, layer: int, qkv: Tensor, plan: PlanT) -> Tensor:
        """[T, (Hq + 2 Hkv) * D] -> [T, Hq * D]; writes the tokens' keys and values into the pool.

        ``qkv`` may be overwritten.
        """
        ...


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A row's part of the step: flat tokens first .. first+num_tokens-1 at positions kv_len onwards."""

    first: int
    num_tokens: int
    kv_len: int
    extent: Extent

    @property
    def total_len(self) -> int:
        return self.kv_len + self.num_tokens

    def window_start(self, window: int | None) -> int:
        """The first position that any of the row's tokens sees."""
        return 0 if window is None else max(0, self.kv_len + 1 - window)

    def pool_indices(self, first_position: int) -> list[int]:
        """Where the row's positions first_position .. total_len-1 are in the pool."""
        extent = self.extent
        own = range(
            extent.start + max(first_position, extent.prefix_len) - extent.prefix_len,
            extent.start + self.total_len - extent.prefix_len,
        )
        if extent.prefix_start is None or first_position >= extent.prefix_len:
            return list(own)
        shared = range(extent.prefix_start + first_position, extent.prefix_start + extent.prefix_len)
        return [*shared, *own]


def plan_rows(batch: ForwardBatch, kv: KVCache) -> list[RowPlan]:
    """The batch's rows with their extents; asserts that every token has room in its slot."""
    rows, first = [], 0
    for part in batch.slices:
        extent = kv.extent(part.slot)
        assert extent.prefix_len <= part.kv_len, f"{part} would write into its shared prefix: {extent}"
        assert part.kv_len + part.num_tokens <= extent.end_position, f"{part} does not fit its slot: {extent}"
        rows.append(RowPlan(first, part.num_tokens, part.kv_len, extent))
        first += part.num_tokens
    assert first == batch.token_ids.shape[0], f"slices cover {first} of {batch.token_ids.shape[0]} flat tokens"
    return rows


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Per flat token. cos, sin: [T, 1, D/2]. destinations: [T] int64 pool index of its key and value."""

    cos: Tensor
    sin: Tensor
    destinations: Tensor


def plan_tokens(rows: Sequence[RowPlan], context: AttentionContext) -> TokenPlan:
    positions = chain.from_iterable(range(row.kv_len, row.total_len) for row in rows)
    destinations = chain.from_iterable(_destinations(row) for row in rows)
    index = index_tensor([*positions, *destinations], context.kv.k.device).view(2, -1)
    cos, sin = context.rope.cos[index[0]], context.rope.sin[index[0]]
    return TokenPlan(cos.unsqueeze(1), sin.unsqueeze(1), index[1])


def _destinations(row: RowPlan) -> range:
    first = row.extent.start + row.kv_len - row.extent.prefix_len
    return range(first, first + row.num_tokens)


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor on the device, without waiting for the device."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class QKVWriter:
    """Splits fused projections, normalises and rotates heads, and writes keys and values into the pool."""

    def __init__(self, context: AttentionContext) -> None:
        spec = context.spec
        self._spec, self._kv = spec, context.kv
        self._head_norms: list[Tensor] | None = None
        if context.q_norms is not None and context.k_norms is not None:
            self._head_norms = [
                torch.cat((q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1)))
                for q, k in zip(context.q_norms, context.k_norms, strict=True)
            ]

    def __call__(self, layer: int, qkv: Tensor, tokens: TokenPlan) -> Tensor:
        """[T, (Hq + 2 Hkv) * D] -> rotated queries [T, Hq, D]."""
        spec = self._spec
        num_rotated = spec.num_heads + spec.num_kv_heads
        heads = qkv.view(qkv.shape[0], num_rotated + spec.num_kv_heads, spec.head_dim)
        qk, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if self._head_norms is not None:
            normed = functional.rms_norm(qk.float(), (spec.head_dim,), None, spec.norm_eps)
            qk = normed.to(qkv.dtype) * self._head_norms[layer]
        low, high = qk.chunk(2, dim=-1)
        cos, sin = tokens.cos, tokens.sin
        rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        self._kv.k[layer].index_copy_(1, tokens.destinations, rotated[:, spec.num_heads :].transpose(0, 1))
        self._kv.v[layer].index_copy_(1, tokens.destinations, value.transpose(0, 1))
        return rotated[:, : spec.num_heads]
