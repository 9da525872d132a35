"""The KV pool: slots never overlap, room is found again, shared prefixes outlive their owner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark_batch.models.kv_cache import Extent, KVCache, kv_pool_tokens
from dspark_batch.tensors import KVStore

POOL = 97


def make_cache(num_tokens: int = POOL) -> KVCache:
    return KVCache(
        num_layers=2,
        num_kv_heads=1,
        head_dim=2,
        num_tokens=num_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


class CacheMachine(RuleBasedStateMachine):
    """Random reservations, with and without prefixes, against a list of what must be held."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache()
        self.live: dict[int, tuple[int, int | None]] = {}

    @rule(num_tokens=st.integers(1, 40))
    def allocate(self, num_tokens: int) -> None:
        slot = self.cache.allocate(num_tokens)
        if slot is not None:
            self.live[slot] = (num_tokens, None)

    @precondition(lambda self: any(prefix is None for _, prefix in self.live.values()))
    @rule(data=st.data(), num_tokens=st.integers(1, 20))
    def share(self, data: st.DataObject, num_tokens: int) -> None:
        prefix = data.draw(st.sampled_from([s for s, (_, p) in self.live.items() if p is None]))
        length = data.draw(st.integers(1, self.live[prefix][0]))
        slot = self.cache.allocate(num_tokens, prefix=prefix, prefix_len=length)
        if slot is not None:
            self.live[slot] = (num_tokens, prefix)
            extent = self.cache.extent(slot)
            assert (extent.prefix_start, extent.prefix_len) == (self.cache.extent(prefix).start, length)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.live)))
        self.cache.free(slot)
        del self.live[slot]

    @invariant()
    def is_consistent(self) -> None:
        self.cache.check_integrity()
        if not self.live:
            assert self.cache.num_free_tokens == POOL


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_cache_fulfils_the_kv_store_protocol() -> None:
    store: KVStore = make_cache()
    assert (store.num_total_tokens, store.num_free_tokens) == (POOL, POOL)


def test_a_full_pool_gives_none_and_a_freed_extent_is_used_again() -> None:
    cache = make_cache(10)
    first, second = cache.allocate(4), cache.allocate(6)
    assert first is not None
    assert cache.allocate(1) is None
    cache.free(first)
    third = cache.allocate(4)
    assert third is not None
    assert third not in (first, second)
    assert cache.extent(third).start == 0


def test_the_smallest_hole_that_fits_is_taken() -> None:
    cache = make_cache(20)
    slots = [cache.allocate(n) for n in (6, 1, 3, 1, 9)]
    assert slots[0] is not None
    assert slots[2] is not None
    cache.free(slots[0])
    cache.free(slots[2])
    small = cache.allocate(3)
    assert small is not None
    assert cache.extent(small).start == 7


def test_neighbouring_holes_are_merged() -> None:
    cache = make_cache(9)
    slots = [cache.allocate(3) for _ in range(3)]
    for slot in (slots[0], slots[2], slots[1]):
        assert slot is not None
        cache.free(slot)
    assert cache.allocate(9) is not None


def test_a_freed_prefix_is_released_with_its_last_sharer() -> None:
    cache = make_cache(20)
    prefix = cache.allocate(8)
    assert prefix is not None
    sharers = [cache.allocate(2, prefix=prefix, prefix_len=n) for n in (8, 5)]
    cache.free(prefix)
    for slot, free in zip(sharers, (8 + 2, 20), strict=True):
        assert slot is not None
        cache.free(slot)
        cache.check_integrity()
        assert cache.num_free_tokens == free


def test_poison_hits_dead_positions_only_and_never_the_shared_prefix() -> None:
    cache = make_cache(20)
    prefix = cache.allocate(5)
    assert prefix is not None
    slot = cache.allocate(4, prefix=prefix, prefix_len=5)
    assert slot is not None
    cache.poison(slot, 7)
    dead = cache.k.isnan().all(dim=-1)[0, 0].nonzero().flatten().tolist()
    assert dead == [7, 8]
    cache.poison(slot, 3)
    assert not cache.v[:, :, :5].isnan().any()
    assert cache.v[:, :, 5:9].isnan().all()


def test_misuse_is_asserted() -> None:
    cache = make_cache()
    slot = cache.allocate(3)
    assert slot is not None
    sharer = cache.allocate(1, prefix=slot, prefix_len=3)
    with pytest.raises(AssertionError, match="cannot be one"):
        cache.allocate(1, prefix=sharer, prefix_len=1)
    with pytest.raises(AssertionError, match="prefix of 4"):
        cache.allocate(1, prefix=slot, prefix_len=4)
    cache.free(slot)
    with pytest.raises(AssertionError, match="was freed"):
        cache.free(slot)
    with pytest.raises(AssertionError, match="not allocated"):
        cache.extent(99)


def test_an_extent_knows_where_its_room_ends() -> None:
    assert Extent(start=10, capacity=4, prefix_start=0, prefix_len=5).end_position == 9


def test_pool_size_follows_the_config_and_is_never_larger_than_useful() -> None:
    cpu = torch.device("cpu")
    assert kv_pool_tokens(1.0, bytes_per_token=2**20, device=cpu, max_useful_tokens=None) == 1024
    assert kv_pool_tokens(1.0, bytes_per_token=2**20, device=cpu, max_useful_tokens=7) == 7
    assert 1 <= kv_pool_tokens("auto", bytes_per_token=2**10, device=cpu, max_useful_tokens=None) <= 2**22
