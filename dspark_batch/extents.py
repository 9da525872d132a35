"""Contiguous extents of a pool of tokens, for memory that is read in place."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class ExtentPool:
    """Tokens 0 .. num_tokens-1 of some memory, handed out in contiguous extents.

    Best fit: the smallest hole that is large enough, the first of several. Neighbouring holes are merged on release, so
    no two holes touch.
    """

    def __init__(self, num_tokens: int) -> None:
        assert num_tokens >= 0, f"a pool of {num_tokens} tokens"
        self._num_tokens = num_tokens
        self._num_free = num_tokens
        self._holes: list[tuple[int, int]] = [(0, num_tokens)] if num_tokens else []

    @property
    def num_total_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_free_tokens(self) -> int:
        return self._num_free

    def take(self, num_tokens: int) -> int | None:
        """The first token of an extent of ``num_tokens`` (at least 1); None when no hole is large enough now."""
        assert num_tokens > 0, f"reservation of {num_tokens} tokens"
        fitting = [hole for hole in self._holes if hole[1] >= num_tokens]
        if not fitting:
            return None
        start, size = hole = min(fitting, key=lambda candidate: (candidate[1], candidate[0]))
        at = bisect_left(self._holes, hole)
        self._holes[at : at + 1] = [(start + num_tokens, size - num_tokens)] if size > num_tokens else []
        self._num_free -= num_tokens
        return start

    def give_back(self, start: int, num_tokens: int) -> None:
        """Release an extent, whole, as it was taken."""
        self._num_free += num_tokens
        at = bisect_left(self._holes, (start, 0))
        if at < len(self._holes):
            assert start + num_tokens <= self._holes[at][0], f"token {self._holes[at][0]} is released twice"
            if self._holes[at][0] == start + num_tokens:
                num_tokens += self._holes.pop(at)[1]
        if at > 0:
            before, size = self._holes[at - 1]
            assert before + size <= start, f"token {start} is released twice"
            if before + size == start:
                start, num_tokens = before, size + num_tokens
                del self._holes[at - 1]
        insort(self._holes, (start, num_tokens))

    def check_integrity(self, taken: Iterable[tuple[int, int]]) -> None:
        """The holes and ``taken``, (start, num_tokens) of every extent in use, tile the pool; no two holes touch."""
        holes = set(self._holes)
        position, previous_is_hole = 0, False
        for start, size in sorted([*taken, *self._holes]):
            assert start == position, f"the pool has a gap or an overlap at token {position}"
            is_hole = (start, size) in holes
            assert not (is_hole and previous_is_hole), f"unmerged holes at token {start}"
            position, previous_is_hole = start + size, is_hole
        assert position == self._num_tokens, f"the pool ends at {position} of {self._num_tokens} tokens"
        assert self._holes == sorted(self._holes), "the free list is out of order"
        assert self._num_free == sum(size for _, size in self._holes), "free tokens are miscounted"
