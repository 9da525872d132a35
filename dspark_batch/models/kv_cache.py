"""Owner of the keys and values of all rows: one pool per layer, one contiguous extent per slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark_batch.extents import ExtentPool
from dspark_batch.models import huge_pages
from dspark_batch.models.machine import available_bytes

GIB = 2**30
_CPU_SHARE, _CPU_SHARE_OF_ALL, _CPU_MAX_BYTES = 0.25, 0.5, 4 * GIB
_CUDA_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a slot's positions are in the pool, in tokens.

    Position p is at ``start + p - prefix_len`` from ``prefix_len`` on, and at ``prefix_start + p`` below it.
    """

    start: int
    capacity: int
    prefix_start: int | None
    prefix_len: int

    @property
    def end_position(self) -> int:
        """One past the last position that the slot has room for."""
        return self.prefix_len + self.capacity


@dataclass(slots=True)
class _Slot:
    extent: Extent
    prefix: int | None
    num_sharers: int = 0
    freed: bool = False


class KVCache:
    """Fulfils ``tensors.KVStore``. ``k`` and ``v`` are [L, Hkv, N, D], N tokens in all.

    A slot that is freed while others read it as their prefix is released with the last of them.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert num_tokens > 0, f"a cache of {num_tokens} tokens"
        shape = (num_layers, num_kv_heads, num_tokens, head_dim)
        self.k = huge_pages.zeros(shape, dtype=dtype, device=device)
        self.v = huge_pages.zeros(shape, dtype=dtype, device=device)
        self._pool = ExtentPool(num_tokens)
        self._slots: dict[int, _Slot] = {}
        self._next_slot = 0

    @property
    def num_total_tokens(self) -> int:
        return self._pool.num_total_tokens

    @property
    def num_free_tokens(self) -> int:
        return self._pool.num_free_tokens

    def allocate(self, num_tokens: int, *, prefix: int | None = None, prefix_len: int = 0) -> int | None:
        """Reserve positions prefix_len .. prefix_len+num_tokens-1; None when no hole is large enough now.

        ``prefix``: a live slot without a prefix of its own, whose positions below ``prefix_len`` are shared.
        """
        assert (prefix is None) == (prefix_len == 0), f"prefix {prefix} with prefix_len {prefix_len}"
        prefix_start = None
        if prefix is not None:
            shared = self._live(prefix)
            assert shared.prefix is None, f"slot {prefix} reads a prefix itself and cannot be one"
            assert prefix_len <= shared.extent.capacity, f"prefix of {prefix_len} in {shared.extent}"
            prefix_start = shared.extent.start
        start = self._pool.take(num_tokens)
        if start is None:
            return None
        if prefix is not None:
            self._slots[prefix].num_sharers += 1
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._slots[slot] = _Slot(Extent(start, num_tokens, prefix_start, prefix_len), prefix)
        return slot

    def free(self, slot: int) -> None:
        self._live(slot).freed = True
        self._release_unused(slot)

    def extent(self, slot: int) -> Extent:
        return self._live(slot).extent

    def poison(self, slot: int, kv_len: int) -> None:
        extent = self.extent(slot)
        first = extent.start + max(0, kv_len - extent.prefix_len)
        end = extent.start + extent.capacity
        self.k[:, :, first:end] = float("nan")
        self.v[:, :, first:end] = float("nan")

    def check_integrity(self) -> None:
        """Holes and extents tile the pool exactly, no two holes touch, and sharers are counted right."""
        self._pool.check_integrity((slot.extent.start, slot.extent.capacity) for slot in self._slots.values())
        for number, slot in self._slots.items():
            sharers = sum(other.prefix == number for other in self._slots.values())
            assert slot.num_sharers == sharers, f"slot {number} counts {slot.num_sharers} sharers, has {sharers}"
            assert not slot.freed or sharers, f"slot {number} is freed and unshared but still held"

    def _live(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        assert entry is not None, f"slot {slot} is not allocated"
        assert not entry.freed, f"slot {slot} was freed"
        return entry

    def _release_unused(self, slot: int) -> None:
        entry = self._slots[slot]
        if not entry.freed or entry.num_sharers:
            return
        del self._slots[slot]
        self._pool.give_back(entry.extent.start, entry.extent.capacity)
        if entry.prefix is not None:
            self._slots[entry.prefix].num_sharers -= 1
            self._release_unused(entry.prefix)


def kv_pool_tokens(
    kv_cache_gib: float | str,
    *,
    bytes_per_token: int,
    device: torch.device,
    max_useful_tokens: int | None,
    machine_share: float = 1.0,
) -> int:
    """How many tokens a pool of ``kv_cache_gib`` holds, at most ``max_useful_tokens``.

    ``auto``: on a CPU a quarter of the available memory (at most 4 GiB; pages are only used once written), or half of
    ``machine_share`` of it, where other engines have the rest; on a CUDA device 80 % of what is free once the weights
    are loaded.
    """
    if not isinstance(kv_cache_gib, str):
        num_bytes = int(kv_cache_gib * GIB)
    elif device.type == "cuda":
        num_bytes = int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    else:
        share = min(_CPU_SHARE, _CPU_SHARE_OF_ALL * machine_share)
        num_bytes = min(int(available_bytes() * share), _CPU_MAX_BYTES)
    num_tokens = num_bytes // bytes_per_token
    return num_tokens if max_useful_tokens is None else min(num_tokens, max_useful_tokens)
