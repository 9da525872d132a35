from __future__ import annotations

import torch

from dspark_batch.engine.prefixes import MIN_PREFIX_TOKENS, PrefixPool
from dspark_batch.models.kv_cache import KVCache


def make_pool(num_tokens: int = 4000) -> tuple[PrefixPool, KVCache]:
    kv = KVCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=4,
        num_tokens=num_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return PrefixPool(kv), kv


def test_a_prefix_is_found_behind_a_request_that_does_not_share_it() -> None:
    pool, _ = make_pool()
    shared = list(range(MIN_PREFIX_TOKENS + 3))
    use = pool.acquire([*shared, 900], waiting=[[800, 801], [*shared, 901]], num_samples=1)
    assert use is not None
    assert use.num_tokens == len(shared)
    assert [prefix.token_ids for prefix in pool.unfinished()] == [shared]


def test_a_prefix_outlives_its_users_and_is_taken_up_again() -> None:
    pool, kv = make_pool()
    shared = list(range(50))
    use = pool.acquire([*shared, 900], waiting=[[*shared, 901]], num_samples=1)
    assert use is not None
    pool.release(use)
    later = pool.acquire([*shared, 905], waiting=[], num_samples=1)
    assert later is not None
    assert later.prefix is use.prefix
    pool.release(later)
    assert pool.drop_idle()
    assert kv.num_free_tokens == kv.num_total_tokens


def test_prompts_that_share_too_little_get_no_prefix() -> None:
    pool, _ = make_pool()
    short = list(range(MIN_PREFIX_TOKENS - 1))
    assert pool.acquire([*short, 900], waiting=[[*short, 901]], num_samples=1) is None


def test_several_samples_share_the_prompt_up_to_its_last_token() -> None:
    pool, _ = make_pool()
    prompt = list(range(40))
    use = pool.acquire(prompt, waiting=[], num_samples=2)
    assert use is not None
    assert use.num_tokens == 39


def test_making_room_for_a_longer_prefix_keeps_the_one_that_was_found() -> None:
    pool, kv = make_pool(num_tokens=64)
    short = list(range(MIN_PREFIX_TOKENS + 1))
    first = pool.acquire(short, waiting=[], num_samples=2)
    assert first is not None
    pool.release(first)
    # Half of it is more than what was found, and too much for the memory, whatever is dropped.
    second = pool.acquire([*short[:-1], *range(100, 140)], waiting=[], num_samples=2)
    assert second is not None
    assert second.prefix is first.prefix
    slot = kv.allocate(8, prefix=second.prefix.slot, prefix_len=second.num_tokens)
    assert slot is not None
    kv.free(slot)
    pool.release(second)
    pool.clear()
    pool.check_integrity()
    assert kv.num_free_tokens == kv.num_total_tokens
