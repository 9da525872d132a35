import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.drafters.dspark.context_cache import ContextCache


def make_cache(num_tokens: int, *, limit: int = 10**9) -> ContextCache:
    return ContextCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        num_tokens=num_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
        pending_limit_bytes=limit,
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 23)), max_size=60), st.sampled_from([1, 31, 64]))
@settings(max_examples=80, deadline=None)
def test_extents_tile_the_pool_whatever_comes_and_goes(steps: list[tuple[bool, int]], num_tokens: int) -> None:
    cache = make_cache(num_tokens)
    alive: list[int] = []
    for handle, (is_add, size) in enumerate(steps):
        if is_add:
            before = cache.num_free_tokens
            if cache.add(handle, size):
                alive.append(handle)
                assert cache.num_free_tokens == before - size
            else:
                assert cache.num_free_tokens == before
        elif alive:
            cache.remove(alive.pop(size % len(alive)))
        cache.check_integrity()
    for handle in alive:
        cache.remove(handle)
    cache.check_integrity()
    assert (cache.num_free_tokens, cache.num_rows) == (num_tokens, 0)


def test_a_row_without_memory_is_unknown_and_may_leave() -> None:
    cache = make_cache(4)
    assert not cache.add(1, 5)
    assert cache.get(1) is None
    cache.remove(1)
    cache.check_integrity()


def test_waiting_features_are_counted_by_what_they_keep_alive() -> None:
    cache = make_cache(64, limit=400)
    assert cache.add(1, 20)
    assert cache.add(2, 20)
    first, second = cache.get(1), cache.get(2)
    assert first is not None
    assert second is not None
    step = torch.arange(80.0).view(10, 8)
    cache.append(step, [(first, 0, 1)])
    cache.append(step, [(second, 5, 3)])
    assert not cache.is_overfull, "two pieces of one tensor of 320 bytes"
    cache.append(-step, [(first, 4, 1)])
    assert cache.is_overfull
    cache.check_integrity()
    taken = cache.take_pending([first])
    assert taken.tolist() == [step[0].tolist(), (-step[4]).tolist()]
    assert (first.length, first.num_pending, second.num_pending) == (2, 0, 3)
    assert not cache.is_overfull
    cache.append(torch.ones(40, 8), [(first, 39, 1)])
    assert cache.is_overfull
    cache.remove(1)
    assert not cache.is_overfull, "a row that leaves takes its features with it"
    cache.check_integrity()


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=12), st.data())
def test_taken_features_are_the_rows_own_in_order(steps: list[list[int]], data: st.DataObject) -> None:
    """steps[i][r]: tokens that step i committed of row r, behind one that it rejected."""
    cache = make_cache(256)
    rows = []
    for handle in range(3):
        assert cache.add(handle, 64)
        rows.append(cache.get(handle))
    seen: list[list[float]] = [[], [], []]
    taken: list[list[float]] = [[], [], []]
    value = 0
    for counts in steps:
        features = torch.arange(value, value + sum(counts) + 3).float()[:, None]
        value += len(features)
        offset = 0
        for r, count in enumerate(counts):
            if count:
                cache.append(features, [(rows[r], offset, count)])
                seen[r] += features[offset : offset + count, 0].tolist()
            offset += count + 1
        cache.check_integrity()
        chosen = [r for r in data.draw(st.sets(st.integers(0, 2))) if rows[r].num_pending]
        if chosen:
            got = cache.take_pending([rows[r] for r in chosen])[:, 0].tolist()
            for r in chosen:
                new = len(seen[r]) - len(taken[r])
                taken[r] += got[:new]
                del got[:new]
            assert not got
        cache.check_integrity()
    assert all(seen[r][: len(taken[r])] == taken[r] for r in range(3))
    for handle in range(3):
        cache.remove(handle)
    cache.check_integrity()
