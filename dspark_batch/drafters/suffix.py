"""Suffix drafter: what followed the longest repeat of a row's last tokens, in the row itself or in finished rows.

In the spirit of SuffixDecoding (arXiv 2411.04975). Rows of a table share keys, labels and phrases, so the outputs that
are done are the best drafter for those to come. Drafts are one-hot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from torch import Tensor

from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.suffix_choice import Choice, choose
from dspark_batch.drafters.suffix_index import NO_TOKEN, Ints, SuffixIndex
from dspark_batch.engine.config import EngineConfig
from dspark_batch.tensors import DraftBlock, Target

_GLOBAL = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixConfig:
    """Settings of the suffix drafter. About 100 bytes are kept per token of a window.

    max_draft_tokens: γ. orders: context lengths looked up, longest first at run time; matches in between are measured
    exactly, up to the longest order. length_factor, length_offset: a draft has at most factor * match length + offset
    tokens. min_survival: tokens are dropped where the estimated chance of the draft up to them falls below this.
    max_candidates: newest occurrences that vote. local_tokens: newest tokens of a row that are indexed. global_tokens:
    tokens of finished rows that are kept; whole outputs are evicted, oldest first; 0 switches the global part off.
    prompt_tail_tokens: last prompt tokens stored before a finished output, so that its first tokens can be drafted.

    Raises:
        ValueError: a value is out of range.
    """

    max_draft_tokens: int = 16
    orders: tuple[int, ...] = (2, 4, 8, 16)
    length_factor: float = 2.0
    length_offset: float = 0.0
    min_survival: float = 0.1
    max_candidates: int = 8
    local_tokens: int = 4096 - 128
    global_tokens: int = 2**18
    prompt_tail_tokens: int = 16

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip(self.orders, self.orders[1:], strict=False))
        checks = (
            ("max_draft_tokens", 1 <= self.max_draft_tokens <= 64, "must lie in [1, 64]"),
            ("orders", bool(self.orders) and self.orders[0] >= 1 and increasing, "must be positive and increasing"),
            ("length_factor", self.length_factor >= 0, "must not be negative"),
            ("min_survival", 0 <= self.min_survival < 1, "must lie in [0, 1)"),
            ("max_candidates", 1 <= self.max_candidates <= 64, "must lie in [1, 64]"),
            ("local_tokens", self.local_tokens >= 16, "must be at least 16"),
            ("global_tokens", self.global_tokens >= 0, "must not be negative"),
            ("prompt_tail_tokens", self.prompt_tail_tokens >= 0, "must not be negative"),
        )
        for name, ok, rule in checks:
            if not ok:
                raise ValueError(f"suffix drafter: {name} {rule}, got {getattr(self, name)!r}")


@dataclass(slots=True)
class _Local:
    """A row's ring and how many of its tokens are in it."""

    ring: int
    num_seen: int = 0


class SuffixDrafter:
    """Drafts by the longest match in the row's own text or in the outputs of finished rows, whichever promises more."""

    name = "suffix"
    taps: tuple[int, ...] = ()

    def __init__(self, config: SuffixConfig | None = None) -> None:
        self.config = config or SuffixConfig()
        self._index = SuffixIndex(self.config.orders)
        self._index.add_rings(1, num_tokens=max(self.config.global_tokens, 1))
        self._finished: deque[tuple[int, int]] = deque()
        self._free: list[int] = []
        self._rows: dict[int, _Local] = {}

    @classmethod
    def from_config(cls, config: EngineConfig, target: Target, *, target_fingerprint: str) -> SuffixDrafter:
        """The default settings, with γ of ``config`` where it is given."""
        limit = config.max_draft_tokens
        return cls(SuffixConfig() if limit is None else SuffixConfig(max_draft_tokens=limit))

    @property
    def max_draft_tokens(self) -> int:
        return self.config.max_draft_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of all windows."""
        return self._index.num_bytes

    def add(self, row: DraftRow) -> None:
        assert row.handle not in self._rows, f"row {row.handle} was added twice"
        if not self._free:
            self._free = self._index.add_rings(max(1, len(self._rows)), num_tokens=self.config.local_tokens)[::-1]
        self._rows[row.handle] = _Local(ring=self._free.pop())

    def observe(self, row: DraftRow, features: Tensor | None, start: int) -> None:
        """Nothing to do: ``propose`` reads what is new of all rows at once."""

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        local = self._rows.pop(row.handle)
        self._index.clear(local.ring)
        self._free.append(local.ring)
        if finished and self.config.global_tokens > 0 and len(row.token_ids) > row.prompt_len:
            tail = max(0, row.prompt_len - self.config.prompt_tail_tokens)
            self._remember(list(row.token_ids[tail:]))

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        """One-hot drafts; ``confidence`` comes from counts."""
        wanted = [r for r, limit in enumerate(max_tokens) if limit > 0]
        token_ids: list[list[int]] = [[] for _ in rows]
        confidence: list[list[float]] = [[] for _ in rows]
        if wanted:
            rings = np.array([self._rows[rows[r].handle].ring for r in wanted])
            self._read_new_tokens([rows[r] for r in wanted], rings)
            limits = np.minimum([max_tokens[r] for r in wanted], self.config.max_draft_tokens)
            query, choice = self._choose(rings, limits)
            ids, chances = choice.token_ids.tolist(), choice.confidence.tolist()
            for q, length, i, c in zip(query.tolist(), choice.num_tokens.tolist(), ids, chances, strict=True):
                token_ids[wanted[q]] = i[:length]
                confidence[wanted[q]] = c[:length]
        return DraftBlock(token_ids=token_ids, confidence=confidence)

    def _choose(self, local: Ints, limits: Ints) -> tuple[Ints, Choice]:
        """The better choice of local and global for the queries that matched anything, and their numbers."""
        index, config = self._index, self.config
        num_rows = len(local)
        before = index.before(local, index.end[local])
        before = np.concatenate([before, before])
        rings = np.concatenate([local, np.full(num_rows, _GLOBAL)])
        positions, order = index.occurrences(rings, before, limit=config.max_candidates)
        hit = np.flatnonzero(order)
        rings, positions, before = rings[hit], positions[hit], before[hit]
        matches = index.match_lengths(rings, before, positions)
        reach = int(config.length_factor * matches.max(initial=0) + config.length_offset)
        choice = choose(
            index.continuations(rings, positions, max(1, min(int(limits.max()), reach))),
            matches,
            max_tokens=limits[hit % num_rows],
            length_factor=config.length_factor,
            length_offset=config.length_offset,
            min_survival=config.min_survival,
        )
        promise = np.zeros(2 * num_rows)
        promise[hit] = choice.expected
        use_global = promise[num_rows:] > promise[:num_rows]
        used = use_global[hit % num_rows] == (hit >= num_rows)
        return hit[used] % num_rows, choice.take(used)

    def _read_new_tokens(self, rows: Sequence[DraftRow], rings: Ints) -> None:
        room = self._index.room(int(rings[0]))
        new: list[Sequence[int]] = []
        for row in rows:
            local = self._rows[row.handle]
            tokens = row.token_ids[local.num_seen :]
            local.num_seen += len(tokens)
            new.append(tokens if len(tokens) <= room else tokens[-room:])
        counts = np.array([len(tokens) for tokens in new])
        flat = np.fromiter(chain.from_iterable(new), np.int64, int(counts.sum()))
        self._index.extend(rings, flat, counts)

    def _remember(self, tokens: list[int]) -> None:
        """Append one sequence to the global ring; evict whole old sequences to make room."""
        index = self._index
        tokens = [*tokens[-(self.config.global_tokens - 1) :], NO_TOKEN] if self.config.global_tokens > 1 else []
        end = int(index.end[_GLOBAL])
        while self._finished and end + len(tokens) - self._finished[0][0] > self.config.global_tokens:
            index.start[_GLOBAL] = self._finished.popleft()[1]
        self._finished.append((end, end + len(tokens)))
        index.extend(np.array([_GLOBAL]), np.array(tokens, np.int64), np.array([len(tokens)]))

    def check_integrity(self) -> None:
        used = [local.ring for local in self._rows.values()]
        assert sorted([*used, *self._free, _GLOBAL]) == list(range(self._index.num_rings)), "a ring was lost or doubled"
        for local in self._rows.values():
            assert self._index.end[local.ring] <= local.num_seen
        kept = sum(end - start for start, end in self._finished)
        assert kept == self._index.end[_GLOBAL] - self._index.start[_GLOBAL], "the eviction list and the ring differ"
        assert kept <= max(self.config.global_tokens, 1)
        self._index.check_integrity()
