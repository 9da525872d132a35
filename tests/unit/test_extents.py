"""The pool of extents against a map of single tokens, on random ragged sizes."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from dspark_batch.extents import ExtentPool


class TokenMap:
    """The slow oracle: one flag per token; every hole is found anew."""

    def __init__(self, num_tokens: int) -> None:
        self.is_taken = [False] * num_tokens

    def holes(self) -> list[tuple[int, int]]:
        """(size, start), the order in which they are chosen."""
        runs = [(taken, list(group)) for taken, group in groupby(range(len(self.is_taken)), self.is_taken.__getitem__)]
        return sorted((len(tokens), tokens[0]) for taken, tokens in runs if not taken)

    def take(self, num_tokens: int) -> int | None:
        start = next((start for size, start in self.holes() if size >= num_tokens), None)
        if start is not None:
            self._mark(start, num_tokens, taken=True)
        return start

    def give_back(self, start: int, num_tokens: int) -> None:
        self._mark(start, num_tokens, taken=False)

    def _mark(self, start: int, num_tokens: int, *, taken: bool) -> None:
        assert all(state != taken for state in self.is_taken[start : start + num_tokens])
        self.is_taken[start : start + num_tokens] = [taken] * num_tokens


@pytest.mark.parametrize(("num_tokens", "largest"), [(1, 1), (7, 3), (97, 13), (97, 97), (331, 41)])
@pytest.mark.parametrize("seed", range(3))
def test_extents_are_those_of_a_map_of_single_tokens(num_tokens: int, largest: int, seed: int) -> None:
    draw = random.Random(f"{num_tokens} {largest} {seed}")
    pool, oracle = ExtentPool(num_tokens), TokenMap(num_tokens)
    held: list[tuple[int, int]] = []
    for _ in range(300):
        if held and draw.random() < 0.45:
            extent = held.pop(draw.randrange(len(held)))
            pool.give_back(*extent)
            oracle.give_back(*extent)
        else:
            size = draw.randint(1, largest)
            start = pool.take(size)
            assert start == oracle.take(size)
            if start is not None:
                held.append((start, size))
        assert pool.num_free_tokens == oracle.is_taken.count(False)
        pool.check_integrity(held)
    for extent in held:
        pool.give_back(*extent)
    pool.check_integrity([])
    assert pool.take(num_tokens) == 0


def test_the_smallest_hole_that_fits_is_taken_and_what_is_left_of_it_stays_free() -> None:
    pool = ExtentPool(20)
    first, second, third = (pool.take(size) for size in (6, 4, 10))
    assert (first, second, third) == (0, 6, 10)
    pool.give_back(0, 6)
    assert pool.take(11) is None
    pool.give_back(10, 10)
    assert pool.take(5) == 0
    assert pool.take(1) == 5
    pool.check_integrity([(0, 5), (5, 1), (6, 4)])


def test_an_empty_pool_gives_nothing() -> None:
    pool = ExtentPool(0)
    assert pool.take(1) is None
    assert (pool.num_total_tokens, pool.num_free_tokens) == (0, 0)
    pool.check_integrity([])


@pytest.mark.parametrize("extent", [(0, 3), (2, 4), (8, 4), (9, 1), (5, 5)])
def test_an_extent_that_is_free_already_cannot_be_given_back(extent: tuple[int, int]) -> None:
    pool = ExtentPool(20)
    assert pool.take(20) == 0
    pool.give_back(0, 3)
    pool.give_back(9, 3)
    with pytest.raises(AssertionError, match="released twice"):
        pool.give_back(*extent)


@pytest.mark.parametrize(
    ("taken", "reason"), [([(0, 3), (4, 6)], "gap"), ([(0, 5), (4, 6)], "overlap"), ([(0, 9)], "ends at 9")]
)
def test_extents_that_do_not_tile_the_pool_are_found(taken: list[tuple[int, int]], reason: str) -> None:
    pool = ExtentPool(10)
    assert pool.take(10) == 0
    with pytest.raises(AssertionError, match=reason):
        pool.check_integrity(taken)
