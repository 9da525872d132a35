"""Where did the last n tokens occur before? Token rings with hash chains over n-grams of several orders.

Every ring keeps its newest tokens. Per order, a bucket holds the newest position whose preceding n tokens hash to it,
and every position links to the one before it in its bucket (the hash chains of LZ77). Old positions die by being
overwritten, so memory is fixed and nothing is ever deleted. All steps are vectorised over rings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

NO_TOKEN = -1
"""Stands between sequences and before the first token; no context matches across it."""

_OFF = -2
_SLOT_MARGIN = 64
_FIRST_RINGS = 16
_CELL = np.dtype([("key", np.uint64), ("previous", np.int64)])


@dataclass(frozen=True, slots=True)
class RingArrays:
    """The memory of R rings of S slots for L orders. Tokens and positions are stored plus one: fresh zero pages, which
    take no memory until they are written, hold none.

    tokens: [R, S] int32. cells: [R, S, L] hash of the context before the slot's position, and the position before it in
    its bucket. newest: [R, S, L] int64 newest position of each bucket. start, end: [R] int64 positions.
    """

    tokens: NDArray[np.int32]
    cells: NDArray[np.void]
    newest: Ints
    start: Ints
    end: Ints

    @classmethod
    def empty(cls, num_rings: int, *, size: int, num_orders: int) -> RingArrays:
        return cls(
            tokens=np.zeros((num_rings, size), np.int32),
            cells=np.zeros((num_rings, size, num_orders), _CELL),
            newest=np.zeros((num_rings, size, num_orders), np.int64),
            start=np.zeros(num_rings, np.int64),
            end=np.zeros(num_rings, np.int64),
        )

    @property
    def num_bytes(self) -> int:
        return self.tokens.nbytes + self.cells.nbytes + self.newest.nbytes


class SuffixIndex:
    """A set of token rings of one size, each with its own n-gram chains.

    orders: context lengths that are indexed, increasing. num_tokens: room of each ring. A position p of a ring stands
    for the continuation that starts with the token at p; it is filed under the hashes of the n tokens before p.
    """

    def __init__(self, orders: Sequence[int], *, num_tokens: int, num_rings: int = 0) -> None:
        assert list(orders) == sorted(set(orders)), orders
        assert orders, "at least one order"
        self.orders = tuple(orders)
        self.depth = orders[-1]
        self.size = 1 << (num_tokens + self.depth + _SLOT_MARGIN - 1).bit_length()
        rng = np.random.default_rng(0x5AFF1C5)
        self.coefficients = rng.integers(1, 2**63, self.depth, dtype=np.uint64) | np.uint64(1)
        self._levels = np.arange(len(orders))
        self.num_rings = num_rings
        self.arrays = RingArrays.empty(num_rings, size=self.size, num_orders=len(orders))

    @property
    def start(self) -> Ints:
        """[R] the oldest position of each ring that may be found."""
        return self.arrays.start

    @property
    def end(self) -> Ints:
        """[R] the position of each ring's next token."""
        return self.arrays.end

    @property
    def num_bytes(self) -> int:
        """Reserved memory; what no token has reached yet is not resident."""
        return self.arrays.num_bytes

    @property
    def room(self) -> int:
        """How many tokens of a ring stay readable: its size less a margin for contexts that reach back."""
        return self.size - self.depth - _SLOT_MARGIN

    def add_ring(self) -> int:
        """An empty ring's number."""
        if self.num_rings == len(self.start):
            self._grow(max(_FIRST_RINGS, 2 * self.num_rings))
        self.num_rings += 1
        return self.num_rings - 1

    def _grow(self, num_rings: int) -> None:
        """Move to larger arrays, at the cost of the tokens that are there."""
        old = self.arrays
        new = self.arrays = RingArrays.empty(num_rings, size=self.size, num_orders=len(self.orders))
        new.start[: self.num_rings], new.end[: self.num_rings] = old.start, old.end
        for ring in range(self.num_rings):
            used = min(int(old.end[ring]), self.size)
            new.tokens[ring, :used] = old.tokens[ring, :used]
            new.cells[ring, :used] = old.cells[ring, :used]
            buckets = (ring, self._home(old.cells["key"][ring, :used]), self._levels)
            new.newest[buckets] = old.newest[buckets]

    def clear(self, ring: int) -> None:
        """Forget the ring's tokens."""
        arrays, end = self.arrays, int(self.end[ring])
        used = min(end, self.size)
        arrays.tokens[ring, :used] = 0
        if end > self.size:
            arrays.newest[ring] = 0
        else:
            arrays.newest[ring, self._home(arrays.cells["key"][ring, :used]), self._levels] = 0
        self.start[ring] = self.end[ring] = 0

    def extend(self, rings: Ints, tokens: Ints, counts: Ints) -> None:
        """Append ``counts[i]`` tokens (at most the room) to ring ``rings[i]``; ``tokens`` holds them in a row.

        Rings are distinct. Tokens that no longer fit push the oldest out; ``start`` follows.
        """
        which = np.repeat(rings, counts)
        first = np.cumsum(counts) - counts
        position = np.repeat(self.end[rings] - first, counts) + np.arange(len(tokens))
        self.arrays.tokens[which, position & (self.size - 1)] = tokens + 1
        self.end[rings] += counts
        self.start[rings] = np.maximum(self.start[rings], self.end[rings] - self.room)
        before = self.before(which, position)
        hashes = self.hash_contexts(before)
        self._file(which, position, hashes, self._complete(before) & (tokens >= 0)[:, None])

    def _complete(self, before: Ints) -> NDArray[np.bool_]:
        """[N, orders]: whether the last n tokens belong to one sequence."""
        sequence = np.logical_and.accumulate(before[:, ::-1] >= 0, axis=1)
        complete: NDArray[np.bool_] = sequence[:, [order - 1 for order in self.orders]]
        return complete

    def _file(self, rings: Ints, position: Ints, keys: Hashes, wanted: NDArray[np.bool_]) -> None:
        """File positions [N] under those of their hashes [N, orders] that are wanted."""
        at, level = np.nonzero(wanted)
        if not len(at):
            return
        rings, key, position = rings[at], keys[at, level], position[at]
        newest = self.arrays.newest.reshape(-1)
        bucket = (rings * self.size + self._home(key)) * len(self.orders) + level
        by_bucket = np.argsort(bucket, kind="stable")
        bucket, stored = bucket[by_bucket], position[by_bucket] + 1
        opens = np.empty(len(bucket), bool)
        opens[0] = True
        np.not_equal(bucket[1:], bucket[:-1], out=opens[1:])
        older = np.empty_like(stored)
        older[1:] = stored[:-1]
        older[opens] = newest[bucket[opens]]
        cell = ((rings * self.size + (position & (self.size - 1))) * len(self.orders) + level)[by_bucket]
        cells = self.arrays.cells.reshape(-1)
        cells["key"][cell] = key[by_bucket]
        cells["previous"][cell] = older
        closes = np.append(opens[1:], True)
        newest[bucket[closes]] = stored[closes]

    def _home(self, keys: Hashes) -> Ints:
        """The slots of the keys' buckets."""
        spread = (keys ^ (keys >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        home: Ints = (spread >> np.uint64(32)).astype(np.int64) & (self.size - 1)
        return home

    def before(self, rings: Ints, position: Ints) -> Ints:
        """[N, depth]: the tokens before each position, oldest first; NO_TOKEN where there is none."""
        at = position[:, None] + np.arange(-self.depth, 0)
        return self.read(rings, at)

    def read(self, rings: Ints, at: Ints) -> Ints:
        """[N, ...] tokens at ring positions, which must not be older than the margin nor past the end."""
        which = rings.reshape((-1,) + (1,) * (at.ndim - 1))
        tokens: Ints = self.arrays.tokens[which, at & (self.size - 1)].astype(np.int64) - 1
        return tokens

    def hash_contexts(self, before: Ints) -> Hashes:
        """[N, depth] tokens -> [N, len(orders)] hashes of the last n of them; multilinear, modulo 2**64."""
        terms = (before.astype(np.uint64) + np.uint64(1)) * self.coefficients
        sums: Hashes = np.cumsum(terms[:, ::-1], axis=1, dtype=np.uint64)
        hashes: Hashes = sums[:, [order - 1 for order in self.orders]]
        return hashes

    def occurrences(self, rings: Ints, before: Ints, *, limit: int) -> tuple[Ints, Ints]:
        """The newest positions, at most ``limit``, at which the longest indexed context of each query occurred.

        before: [Q, depth], what :meth:`before` gives at the queries' ends. Gives positions [Q, limit], newest first and
        -1 where there are no more, and the matched order [Q], 0 for none. ``limit`` counts chain links, those of other
        contexts in the same bucket included.
        """
        hashes = self.hash_contexts(before)
        which = rings[:, None]
        here = self.arrays.newest[which, self._home(hashes), self._levels] - 1
        start = self.start[which]
        found = np.full((limit, len(rings), len(self.orders)), -1, np.int64)
        alive = (here >= start) & self._complete(before)
        for link in range(limit):
            if not alive.any():
                break
            cell = self.arrays.cells[which, here & (self.size - 1), self._levels]
            np.copyto(found[link], here, where=alive & (cell["key"] == hashes))
            here = cell["previous"] - 1
            alive &= here >= start
        hit = found.max(0) >= 0
        level = len(self.orders) - 1 - np.argmax(hit[:, ::-1], axis=1)
        positions = found[:, np.arange(len(rings)), level].T
        newest_first = np.argsort(positions < 0, axis=1, kind="stable")
        order = np.where(np.any(hit, axis=1), np.asarray(self.orders)[level], 0)
        return np.take_along_axis(positions, newest_first, 1), order

    def match_lengths(self, rings: Ints, before: Ints, positions: Ints) -> Ints:
        """[Q, M]: how many tokens before each position (-1: none) equal the query's last ones, at most depth."""
        at = np.maximum(positions, 0)[:, :, None] + np.arange(-1, -self.depth - 1, -1)
        same = self.read(rings, at) == np.where(before >= 0, before, _OFF)[:, None, ::-1]
        return np.where(same.all(2), self.depth, same.argmin(2)) * (positions >= 0)

    def continuations(self, rings: Ints, positions: Ints, length: int) -> Ints:
        """[Q, M, length] tokens from each position on; NO_TOKEN past a sequence's or the ring's end."""
        at = positions[:, :, None] + np.arange(length)
        tokens = self.read(rings, np.maximum(at, 0))
        tokens[(at >= self.end[rings][:, None, None]) | (positions < 0)[:, :, None]] = NO_TOKEN
        ended = np.logical_or.accumulate(tokens == NO_TOKEN, axis=2)
        tokens[ended] = NO_TOKEN
        return tokens

    def check_integrity(self) -> None:
        """Windows fit their rings; live chains descend and stay within the window."""
        assert self.num_rings <= len(self.start)
        assert (self.start <= self.end).all()
        assert (self.end - self.start <= self.size).all()
        assert not self.end[self.num_rings :].any(), "tokens in a ring that nobody has"
        for ring in range(self.num_rings):
            for level, order in enumerate(self.orders):
                live = self.arrays.newest[ring, :, level] - 1
                live = live[live >= self.start[ring]]
                assert (live < self.end[ring]).all(), f"order {order}, ring {ring}: a bucket points past the end"
                previous = self.arrays.cells["previous"][ring, live & (self.size - 1), level] - 1
                assert (previous < live).all(), f"order {order}, ring {ring}: a chain ascends"
