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

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.drafters.suffix_index import NO_TOKEN, Ints, SuffixIndex
from dspark_batch.drafters.suffix_native import MAX_CANDIDATES, MAX_DRAFT_TOKENS, NativeSearch
from dspark_batch.drafters.suffix_search import NumpySearch, SearchRules, SuffixSearch
from dspark_batch.engine.config import EngineConfig
from dspark_batch.models.kernels.library import Kernels, load_kernels
from dspark_batch.tensors import DraftBlock, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixConfig:
    """Settings of the suffix drafter. About 100 bytes are kept per token of a window that
    is in use; windows are rounded up to powers of two.

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
    global_tokens: int = 2**18 - 128
    prompt_tail_tokens: int = 16

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip(self.orders, self.orders[1:], strict=False))
        checks = (
            (
                "max_draft_tokens",
                1 <= self.max_draft_tokens <= MAX_DRAFT_TOKENS,
                f"must lie in [1, {MAX_DRAFT_TOKENS}]",
            ),
            ("orders", bool(self.orders) and self.orders[0] >= 1 and increasing, "must be positive and increasing"),
            ("length_factor", self.length_factor >= 0, "must not be negative"),
            ("min_survival", 0 <= self.min_survival < 1, "must lie in [0, 1)"),
            ("max_candidates", 1 <= self.max_candidates <= MAX_CANDIDATES, f"must lie in [1, {MAX_CANDIDATES}]"),
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
    """Drafts by the longest match in the row's own text or in the outputs of finished rows, whichever promises more.

    kernels: None looks up with numpy, which finds the same drafts and takes ten times as long.
    """

    name = "suffix"
    taps: tuple[int, ...] = ()
    learns_from_finished = True

    def __init__(self, config: SuffixConfig | None = None, *, kernels: Kernels | None = None) -> None:
        self.config = config = config or SuffixConfig()
        self._local = SuffixIndex(config.orders, num_tokens=config.local_tokens)
        self._global = SuffixIndex(config.orders, num_tokens=max(config.global_tokens, 1), num_rings=1)
        self._search = _make_search(config, kernels)
        self._finished: deque[tuple[int, int]] = deque()
        self._free: list[int] = []
        self._rows: dict[int, _Local] = {}

    @classmethod
    def from_config(cls, config: EngineConfig, target: Target, *, target_fingerprint: str) -> SuffixDrafter:
        """The default settings, with γ of ``config`` where it is given, and native lookups where they can be had."""
        limit = config.max_draft_tokens
        settings = SuffixConfig() if limit is None else SuffixConfig(max_draft_tokens=limit)
        return cls(settings, kernels=load_kernels())

    @property
    def max_draft_tokens(self) -> int:
        return self.config.max_draft_tokens

    @property
    def num_bytes(self) -> int:
        """Memory reserved for all windows; what no token has reached yet is not resident."""
        return self._local.num_bytes + self._global.num_bytes

    def add(self, row: DraftRow) -> None:
        assert row.handle not in self._rows, f"row {row.handle} was added twice"
        self._rows[row.handle] = _Local(ring=self._free.pop() if self._free else self._local.add_ring())

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        """Nothing to do: ``propose`` reads what is new of all rows at once."""

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        local = self._rows.pop(row.handle)
        self._search.clear(self._local, local.ring)
        self._free.append(local.ring)
        if finished and self.config.global_tokens > 1 and len(row.token_ids) > row.prompt_len:
            tail = max(0, row.prompt_len - self.config.prompt_tail_tokens)
            self._remember(row.token_ids[tail:])

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        """One-hot drafts; ``confidence`` comes from counts."""
        token_ids: list[list[int]] = [[] for _ in rows]
        confidence: list[list[float]] = [[] for _ in rows]
        wanted = [r for r, limit in enumerate(max_tokens) if limit > 0]
        if wanted:
            longest = self.config.max_draft_tokens
            rings = self._read_new_tokens([rows[r] for r in wanted])
            limits = np.array([min(max_tokens[r], longest) for r in wanted], np.int64)
            drafts = self._search.drafts(self._local, self._global, rings, limits)
            lengths, ids, chances = drafts.num_tokens.tolist(), drafts.token_ids.tolist(), drafts.confidence.tolist()
            for r, length, i, c in zip(wanted, lengths, ids, chances, strict=True):
                token_ids[r], confidence[r] = i[:length], c[:length]
        return DraftBlock(token_ids=token_ids, confidence=confidence)

    def _read_new_tokens(self, rows: Sequence[DraftRow]) -> Ints:
        """Bring the rows' rings up to date; gives the rings."""
        room = self._local.room
        rings: list[int] = []
        new: list[Sequence[int]] = []
        for row in rows:
            local, end = self._rows[row.handle], len(row.token_ids)
            new.append(row.token_ids[max(local.num_seen, end - room) :])
            rings.append(local.ring)
            local.num_seen = end
        counts = np.array([len(tokens) for tokens in new], np.int64)
        flat = np.fromiter(chain.from_iterable(new), np.int64, sum(map(len, new)))
        ring_array = np.array(rings, np.int64)
        self._search.extend(self._local, ring_array, flat, counts)
        return ring_array

    def _remember(self, output: Sequence[int]) -> None:
        """Append one sequence to the global ring; evict whole old sequences to make room."""
        index, limit = self._global, self.config.global_tokens
        tokens = np.array([*output[1 - limit :], NO_TOKEN], np.int64)
        end = int(index.end[0])
        while self._finished and end + len(tokens) - self._finished[0][0] > limit:
            index.start[0] = self._finished.popleft()[1]
        self._finished.append((end, end + len(tokens)))
        self._search.extend(index, np.zeros(1, np.int64), tokens, np.array([len(tokens)], np.int64))

    def check_integrity(self) -> None:
        used = [local.ring for local in self._rows.values()]
        assert sorted([*used, *self._free]) == list(range(self._local.num_rings)), "a ring was lost or doubled"
        for local in self._rows.values():
            assert self._local.end[local.ring] <= local.num_seen
        kept = sum(end - start for start, end in self._finished)
        assert kept == self._global.end[0] - self._global.start[0], "the eviction list and the ring differ"
        assert kept <= max(self.config.global_tokens, 1)
        self._local.check_integrity()
        self._global.check_integrity()


def _make_search(config: SuffixConfig, kernels: Kernels | None) -> SuffixSearch:
    rules = SearchRules(
        max_candidates=config.max_candidates,
        length_factor=config.length_factor,
        length_offset=config.length_offset,
        min_survival=config.min_survival,
    )
    if kernels is None:
        return NumpySearch(rules)
    return NativeSearch(rules, kernels, depth=config.orders[-1], max_draft_tokens=config.max_draft_tokens)
