"""Owner of the keys and values of all rows: one pool per layer, one contiguous extent per slot."""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from dataclasses import dataclass

import torch

GIB = 2**30
_CPU_SHARE, _CPU_MAX_BYTES = 0.25, 4 * GIB
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

    Extents come from a best-fit free list whose neighbours are merged on release. A slot that is freed while others
    read it as their prefix is released with the last of them.
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
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self._num_tokens = num_tokens
        self._num_free = num_tokens
        self._holes: list[tuple[int, int]] = [(0, num_tokens)]
        self._slots: dict[int, _Slot] = {}
        self._next_slot = 0

    @property
    def num_total_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_free_tokens(self) -> int:
        return self._num_free

    def allocate(self, num_tokens: int, *, prefix: int | None = None, prefix_len: int = 0) -> int | None:
        """Reserve positions prefix_len .. prefix_len+num_tokens-1; None when no hole is large enough now.

        ``prefix``: a live slot without a prefix of its own, whose positions below ``prefix_len`` are shared.
        """
        assert num_tokens > 0, f"reservation of {num_tokens} tokens"
        assert (prefix is None) == (prefix_len == 0), f"prefix {prefix} with prefix_len {prefix_len}"
        prefix_start = None
        if prefix is not None:
            shared = self._live(prefix)
            assert shared.prefix is None, f"slot {prefix} reads a prefix itself and cannot be one"
            assert prefix_len <= shared.extent.capacity, f"prefix of {prefix_len} in {shared.extent}"
            prefix_start = shared.extent.start
        start = self._take(num_tokens)
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
        taken = [(slot.extent.start, slot.extent.capacity) for slot in self._slots.values()]
        position, previous_is_hole = 0, False
        holes = set(self._holes)
        for start, size in sorted([*taken, *self._holes]):
            assert start == position, f"pool has a gap or an overlap at token {position}"
            is_hole = (start, size) in holes
            assert not (is_hole and previous_is_hole), f"unmerged holes at token {start}"
            position, previous_is_hole = start + size, is_hole
        assert position == self._num_tokens, f"pool ends at {position} of {self._num_tokens} tokens"
        assert self._holes == sorted(self._holes), "free list out of order"
        assert self._num_free == sum(size for _, size in self._holes), "free tokens are miscounted"
        for number, slot in self._slots.items():
            sharers = sum(other.prefix == number for other in self._slots.values())
            assert slot.num_sharers == sharers, f"slot {number} counts {slot.num_sharers} sharers, has {sharers}"
            assert not slot.freed or sharers, f"slot {number} is freed and unshared but still held"

    def _live(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        assert entry is not None, f"slot {slot} is not allocated"
        assert not entry.freed, f"slot {slot} was freed"
        return entry

    def _take(self, num_tokens: int) -> int | None:
        fitting = [hole for hole in self._holes if hole[1] >= num_tokens]
        if not fitting:
            return None
        start, size = hole = min(fitting, key=lambda candidate: (candidate[1], candidate[0]))
        self._holes.remove(hole)
        if size > num_tokens:
            insort(self._holes, (start + num_tokens, size - num_tokens))
        self._num_free -= num_tokens
        return start

    def _release_unused(self, slot: int) -> None:
        entry = self._slots[slot]
        if not entry.freed or entry.num_sharers:
            return
        del self._slots[slot]
        self._give_back(entry.extent.start, entry.extent.capacity)
        if entry.prefix is not None:
            self._slots[entry.prefix].num_sharers -= 1
            self._release_unused(entry.prefix)

    def _give_back(self, start: int, size: int) -> None:
        self._num_free += size
        at = bisect_left(self._holes, (start, 0))
        if at < len(self._holes) and self._holes[at][0] == start + size:
            size += self._holes.pop(at)[1]
        if at > 0 and sum(self._holes[at - 1]) == start:
            start, extra = self._holes.pop(at - 1)
            size += extra
        insort(self._holes, (start, size))


def kv_pool_tokens(
    kv_cache_gib: float | str, *, bytes_per_token: int, device: torch.device, max_useful_tokens: int | None
) -> int:
    """How many tokens a pool of ``kv_cache_gib`` holds, at most ``max_useful_tokens``.

    ``auto``: a quarter of the available memory on a CPU (at most 4 GiB; pages are only used once written), 80 % of
    what is free on a CUDA device once the weights are loaded.
    """
    if not isinstance(kv_cache_gib, str):
        num_bytes = int(kv_cache_gib * GIB)
    elif device.type == "cuda":
        num_bytes = int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    else:
        num_bytes = min(int(_available_bytes() * _CPU_SHARE), _CPU_MAX_BYTES)
    num_tokens = num_bytes // bytes_per_token
    return num_tokens if max_useful_tokens is None else min(num_tokens, max_useful_tokens)


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
