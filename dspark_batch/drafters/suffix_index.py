"""Where did the last n tokens occur before? Token rings with hash chains over n-grams of several orders.

Every ring keeps its newest tokens. Per order, a bucket holds the newest position whose preceding n tokens hash to it,
and every position links to the one before it in its bucket (the hash chains of LZ77). Old positions die by being
overwritten, so memory is fixed and nothing is ever deleted. All steps are vectorised over rings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

NO_TOKEN = -1
"""Stands between sequences and before the first token; no context matches across it."""

_OFF = -2
_SLOT_MARGIN = 64


class SuffixIndex:
    """A set of token rings, each with its own n-gram chains.

    orders: context lengths that are indexed, increasing. A position p of a ring stands for the continuation that starts
    with the token at p; it is filed under the hashes of the n tokens before p.
    """

    def __init__(self, orders: Sequence[int]) -> None:
        assert list(orders) == sorted(set(orders)), orders
        assert orders, "at least one order"
        self.orders = tuple(orders)
        self.depth = orders[-1]
        rng = np.random.default_rng(0x5AFF1C5)
        self._coefficients = rng.integers(1, 2**63, self.depth, dtype=np.uint64) | np.uint64(1)
        self._tokens = np.empty(0, np.int32)
        self._levels = np.arange(len(orders))
        self._keys = np.empty(0, np.uint64)
        self._previous = np.empty(0, np.int64)
        self._newest = np.empty(0, np.int64)
        self.offset = np.empty(0, np.int64)
        self.mask = np.empty(0, np.int64)
        self.start = np.empty(0, np.int64)
        self.end = np.empty(0, np.int64)

    @property
    def num_rings(self) -> int:
        return len(self.offset)

    @property
    def num_bytes(self) -> int:
        return self._tokens.nbytes + self._keys.nbytes + self._previous.nbytes + self._newest.nbytes

    def room(self, ring: int) -> int:
        """How many tokens of the ring stay readable: its size less a margin for contexts that reach back."""
        return int(self.mask[ring]) + 1 - self.depth - _SLOT_MARGIN

    def add_rings(self, count: int, *, num_tokens: int) -> list[int]:
        """Empty rings with room for ``num_tokens`` each; their numbers."""
        size = 1 << (num_tokens + self.depth + _SLOT_MARGIN - 1).bit_length()
        first, base, added = self.num_rings, len(self._tokens), count * size
        num_cells = added * len(self.orders)
        self._tokens = np.concatenate([self._tokens, np.full(added, NO_TOKEN, np.int32)])
        self._keys = np.concatenate([self._keys, np.zeros(num_cells, np.uint64)])
        self._previous = np.concatenate([self._previous, np.full(num_cells, -1, np.int64)])
        self._newest = np.concatenate([self._newest, np.full(num_cells, -1, np.int64)])
        self.offset = np.concatenate([self.offset, base + size * np.arange(count)])
        self.mask = np.concatenate([self.mask, np.full(count, size - 1)])
        self.start = np.concatenate([self.start, np.zeros(count, np.int64)])
        self.end = np.concatenate([self.end, np.zeros(count, np.int64)])
        return list(range(first, first + count))

    def clear(self, ring: int) -> None:
        """Forget the ring's tokens."""
        part = slice(int(self.offset[ring]), int(self.offset[ring] + self.mask[ring] + 1))
        self._tokens[part] = NO_TOKEN
        self._newest[part.start * len(self.orders) : part.stop * len(self.orders)] = -1
        self.start[ring] = self.end[ring] = 0

    def extend(self, rings: Ints, tokens: Ints, counts: Ints) -> None:
        """Append ``counts[i]`` tokens (at most the ring's room) to ring ``rings[i]``; ``tokens`` holds them in a row.

        Rings are distinct. Tokens that no longer fit push the oldest out; ``start`` follows.
        """
        which = np.repeat(rings, counts)
        first = np.cumsum(counts) - counts
        position = np.repeat(self.end[rings] - first, counts) + np.arange(len(tokens))
        slot = self.offset[which] + (position & self.mask[which])
        self._tokens[slot] = tokens
        self.end[rings] += counts
        room = self.mask[rings] + 1 - self.depth - _SLOT_MARGIN
        self.start[rings] = np.maximum(self.start[rings], self.end[rings] - room)
        before = self.before(which, position)
        hashes = self.hash_contexts(before)
        self._file(which, position, slot, hashes, self._complete(before) & (tokens >= 0)[:, None])

    def _complete(self, before: Ints) -> NDArray[np.bool_]:
        """[N, orders]: whether the last n tokens belong to one sequence."""
        sequence = np.logical_and.accumulate(before[:, ::-1] >= 0, axis=1)
        complete: NDArray[np.bool_] = sequence[:, [order - 1 for order in self.orders]]
        return complete

    def _file(self, rings: Ints, position: Ints, slot: Ints, keys: Hashes, wanted: NDArray[np.bool_]) -> None:
        """File positions [N] under those of their hashes [N, orders] that are wanted."""
        at, level = np.nonzero(wanted)
        if not len(at):
            return
        key, position = keys[at, level], position[at]
        bucket = self._bucket(rings[at], key, level)
        by_bucket = np.argsort(bucket, kind="stable")
        bucket, position = bucket[by_bucket], position[by_bucket]
        opens = np.empty(len(bucket), bool)
        opens[0] = True
        np.not_equal(bucket[1:], bucket[:-1], out=opens[1:])
        older = np.empty_like(position)
        older[1:] = position[:-1]
        older[opens] = self._newest[bucket[opens]]
        cell = (slot[at] * len(self.orders) + level)[by_bucket]
        self._keys[cell] = key[by_bucket]
        self._previous[cell] = older
        closes = np.append(opens[1:], True)
        self._newest[bucket[closes]] = position[closes]

    def _bucket(self, rings: Ints, keys: Hashes, level: Ints) -> Ints:
        spread = (keys ^ (keys >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        home = self.offset[rings] + ((spread >> np.uint64(32)).astype(np.int64) & self.mask[rings])
        return home * len(self.orders) + level

    def before(self, rings: Ints, position: Ints) -> Ints:
        """[N, depth]: the tokens before each position, oldest first; NO_TOKEN where there is none."""
        at = position[:, None] + np.arange(-self.depth, 0)
        return self.read(rings, at)

    def read(self, rings: Ints, at: Ints) -> Ints:
        """[N, ...] tokens at ring positions, which must not be older than the margin nor past the end."""
        shape = (-1,) + (1,) * (at.ndim - 1)
        slot = (at & self.mask[rings].reshape(shape)) + self.offset[rings].reshape(shape)
        tokens: Ints = self._tokens[slot].astype(np.int64)
        return tokens

    def hash_contexts(self, before: Ints) -> Hashes:
        """[N, depth] tokens -> [N, len(orders)] hashes of the last n of them; multilinear, modulo 2**64."""
        terms = (before.astype(np.uint64) + np.uint64(1)) * self._coefficients
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
        here = self._newest[self._bucket(rings[:, None], hashes, self._levels)]
        start, mask, offset = self.start[rings][:, None], self.mask[rings][:, None], self.offset[rings][:, None]
        found = np.full((limit, len(rings), len(self.orders)), -1, np.int64)
        alive = (here >= start) & self._complete(before)
        for link in range(limit):
            if not alive.any():
                break
            cell = (offset + (here & mask)) * len(self.orders) + self._levels
            np.copyto(found[link], here, where=alive & (self._keys[cell] == hashes))
            here = self._previous[cell]
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
        """Rings do not overlap, live chains descend and name contexts that are there."""
        assert (self.start <= self.end).all()
        assert (self.end - self.start <= self.mask + 1).all()
        sizes = self.mask + 1
        assert (self.offset == np.cumsum(sizes) - sizes).all()
        assert sizes.sum() == len(self._tokens)
        newest = self._newest.reshape(-1, len(self.orders))
        previous = self._previous.reshape(-1, len(self.orders))
        for ring in range(self.num_rings):
            part = slice(int(self.offset[ring]), int(self.offset[ring] + sizes[ring]))
            for level, order in enumerate(self.orders):
                live = newest[part, level]
                live = live[live >= self.start[ring]]
                assert (live < self.end[ring]).all(), f"order {order}, ring {ring}: a bucket points past the end"
                slot = self.offset[ring] + (live & self.mask[ring])
                assert (previous[slot, level] < live).all(), f"order {order}, ring {ring}: a chain ascends"
