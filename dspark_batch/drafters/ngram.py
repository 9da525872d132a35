"""Prompt lookup: draft what followed the latest earlier occurrence of the row's last few tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.tensors import DraftBlock

DEFAULT_DRAFT_TOKENS = 4
MAX_NGRAM = 4
MIN_NGRAM = 2


class NgramDrafter:
    """Longest suffix first, from ``max_ngram`` down to ``min_ngram`` tokens; of its earlier occurrences the latest.

    A draft that reaches the row's end goes on with its own tokens, so a short period is drafted to full length.
    A round costs time in the new tokens only: every row keeps an index from n-gram to where it ended last.
    """

    name = "ngram"
    taps: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        max_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        max_ngram: int = MAX_NGRAM,
        min_ngram: int = MIN_NGRAM,
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"1 <= min_ngram <= max_ngram must hold, got min_ngram={min_ngram}, max_ngram={max_ngram}")
        self.max_draft_tokens = max_draft_tokens
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._rows: dict[int, _RowIndex] = {}

    def add(self, row: DraftRow) -> None:
        assert row.handle not in self._rows, f"row {row.handle} was added twice"
        self._rows[row.handle] = _RowIndex(row.token_ids, self._sizes)

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        drafts: list[list[int]] = []
        for row, limit in zip(rows, max_tokens, strict=True):
            drafts.append(self._rows[row.handle].propose(limit) if limit else [])
        return DraftBlock(token_ids=drafts)

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        """Nothing to keep: ``propose`` indexes what has grown."""

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        del self._rows[row.handle]

    def check_integrity(self) -> None:
        for handle, index in self._rows.items():
            assert index.is_consistent(), f"the n-gram index of row {handle} disagrees with its tokens"


class _RowIndex:
    """For every n-gram that something follows, the position after its latest occurrence."""

    def __init__(self, token_ids: Sequence[int], sizes: range) -> None:
        self._token_ids = token_ids
        self._sizes = sizes
        self._next: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, limit: int) -> list[int]:
        self._catch_up()
        tokens = self._token_ids
        length = len(tokens)
        tail = tuple(tokens[-self._sizes[0] :])
        for size in self._sizes:
            source = self._next.get(tail[-size:]) if size <= len(tail) else None
            if source is None:
                continue
            draft = list(tokens[source : source + limit])
            period = length - source
            while len(draft) < limit:
                draft.append(draft[len(draft) - period])
            return draft
        return []

    def _catch_up(self) -> None:
        """Index the n-grams that end before the last token; the last one has no successor yet."""
        tokens = self._token_ids
        first = max(0, self._num_indexed - self._sizes[0])
        new = tuple(tokens[first:])
        for end in range(self._num_indexed, len(tokens) - 1):
            stop = end + 1 - first
            for size in self._sizes:
                if size <= stop:
                    self._next[new[stop - size : stop]] = end + 1
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)

    def is_consistent(self) -> bool:
        tokens = self._token_ids
        return self._num_indexed < max(len(tokens), 1) and all(
            tuple(tokens[source - len(gram) : source]) == gram for gram, source in self._next.items()
        )
