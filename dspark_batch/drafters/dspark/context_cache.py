"""The drafter's memory per row: keys and values of every draft layer for the row's committed positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_batch.extents import ExtentPool
from dspark_batch.models import huge_pages

_FEW_ROWS = 8
"""On a CPU so many rows are written one by one: an indexed copy along an inner dimension takes longer."""


class _Piece(NamedTuple):
    """Tokens ``offset`` .. ``offset+num_tokens-1`` of features: [T, taps*H], of a step or of a shared prefix."""

    features: Tensor
    offset: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class RowContext:
    """One row's memory: pool tokens start .. start+capacity-1; the first ``length`` hold positions 0 .. length-1.

    What lies past ``length`` is dead: a block writes its own keys and values there while it attends. pending: features
    of the positions that follow, not projected yet.
    """

    start: int
    capacity: int
    length: int = 0
    pending: list[_Piece] = field(default_factory=list)
    num_pending: int = 0

    @property
    def num_known(self) -> int:
        """Positions whose features have been seen."""
        return self.length + self.num_pending


class ContextCache:
    """Owner of the context memory. ``k`` and ``v``: [L, Hkv, N, D]. Rows hold one extent each.

    Features that wait are bounded by ``pending_limit_bytes``, counted by the tensors that they keep alive: the owner of
    the cache is told by ``is_overfull`` that everything must be projected now.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        pending_limit_bytes: int,
    ) -> None:
        shape = (num_layers, num_kv_heads, num_tokens, head_dim)
        self.k = huge_pages.zeros(shape, dtype=dtype, device=device)
        self.v = huge_pages.zeros(shape, dtype=dtype, device=device)
        self._pool = ExtentPool(num_tokens)
        self._rows: dict[int, RowContext] = {}
        self._pending_limit_bytes = pending_limit_bytes
        self._num_pending_bytes = 0
        self._num_waiting: Counter[Tensor] = Counter()

    @property
    def num_total_tokens(self) -> int:
        return self._pool.num_total_tokens

    @property
    def num_free_tokens(self) -> int:
        return self._pool.num_free_tokens

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def is_overfull(self) -> bool:
        return self._num_pending_bytes > self._pending_limit_bytes

    def add(self, handle: int, num_tokens: int) -> bool:
        """Reserve ``num_tokens`` for a row; False, and no memory, where no hole is large enough."""
        assert handle not in self._rows, f"row {handle} already has context memory"
        start = self._pool.take(num_tokens)
        if start is None:
            return False
        self._rows[handle] = RowContext(start, num_tokens)
        return True

    def get(self, handle: int) -> RowContext | None:
        """The row's memory; None for a row that got none."""
        return self._rows.get(handle)

    def rows(self) -> Iterable[RowContext]:
        return self._rows.values()

    def remove(self, handle: int) -> None:
        """Release a row's memory, if it has any."""
        row = self._rows.pop(handle, None)
        if row is not None:
            self._pool.give_back(row.start, row.capacity)
            self._let_go(row.pending)

    def append(self, features: Tensor, places: Iterable[tuple[RowContext, int, int]]) -> None:
        """Keep features of the positions from ``num_known`` of each row on; they are not copied.

        features: [T, taps*H]. places: (row, offset, num_tokens); all rows of a step in one call, since this is paid for
        by steps without drafts too.
        """
        num_pieces = 0
        for row, offset, num_tokens in places:
            row.pending.append(_Piece(features, offset, num_tokens))
            row.num_pending += num_tokens
            num_pieces += 1
        if not num_pieces:
            return
        if features not in self._num_waiting:
            self._num_pending_bytes += _num_bytes(features)
        self._num_waiting[features] += num_pieces

    def take_pending(self, rows: Sequence[RowContext]) -> Tensor:
        """[n, taps*H]: the waiting features of the rows, in order; the positions count as held from now on."""
        pieces: list[_Piece] = []
        for row in rows:
            pieces += row.pending
            row.length += row.num_pending
            row.pending, row.num_pending = [], 0
        self._let_go(pieces)
        return _gather(pieces)

    def check_integrity(self) -> None:
        """Holes and extents tile the pool, no two holes touch, and every row stays within its extent."""
        self._pool.check_integrity((row.start, row.capacity) for row in self._rows.values())
        for handle, row in self._rows.items():
            assert row.num_known <= row.capacity, f"row {handle} knows {row.num_known} positions of {row.capacity}"
            assert row.num_pending == sum(p.num_tokens for p in row.pending), f"row {handle} miscounts its features"
        waiting = Counter(piece.features for row in self._rows.values() for piece in row.pending)
        assert waiting == self._num_waiting, "pieces of some features are miscounted"
        num_bytes = sum(map(_num_bytes, waiting))
        assert num_bytes == self._num_pending_bytes, f"{num_bytes} bytes wait, {self._num_pending_bytes} are counted"

    def _let_go(self, pieces: Iterable[_Piece]) -> None:
        for features, num_pieces in Counter(piece.features for piece in pieces).items():
            self._num_waiting[features] -= num_pieces
            if not self._num_waiting[features]:
                del self._num_waiting[features]
                self._num_pending_bytes -= _num_bytes(features)


class SpanWriter:
    """Writes what is new of some rows into pools of the context memory; one serves all layers of a round.

    spans: (first pool token, count) of each row; their tokens lie one behind the other in what is written.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._spans = spans
        self._index: Tensor | None = None
        if device.type != "cpu" or len(spans) > _FEW_ROWS:
            places = [place for first, count in spans for place in range(first, first + count)]
            self._index = torch.tensor(places).to(device)

    def write(self, pool: Tensor, new: Tensor, *, at: int = 0) -> None:
        """new: [..., M, D], the tokens from ``at`` on, to pool [..., N, D]."""
        end = at + new.shape[-2]
        if self._index is not None:
            pool.index_copy_(pool.dim() - 2, self._index[at:end], new)
            return
        start = 0
        for first, count in self._spans:
            low, high = max(start, at), min(start + count, end)
            if low < high:
                pool[..., first + low - start : first + high - start, :] = new[..., low - at : high - at, :]
            start += count


def _num_bytes(features: Tensor) -> int:
    """That are kept alive."""
    return features.untyped_storage().nbytes()


def _gather(pieces: Sequence[_Piece]) -> Tensor:
    """The pieces one behind the other. Rows that sat out many steps have a piece of one token of each, so the steps
    are copied from once each, not the pieces."""
    first = pieces[0].features
    if len(pieces) == 1:
        return first[pieces[0].offset : pieces[0].offset + pieces[0].num_tokens]
    places: dict[Tensor, tuple[list[int], list[int]]] = {}
    num_tokens = 0
    for piece in pieces:
        taken, put = places.setdefault(piece.features, ([], []))
        taken += range(piece.offset, piece.offset + piece.num_tokens)
        put += range(num_tokens, num_tokens + piece.num_tokens)
        num_tokens += piece.num_tokens
    if len(places) == 1:
        return first.index_select(0, torch.tensor(taken).to(first.device))
    gathered = first.new_empty(num_tokens, first.shape[1])
    for features, (taken, put) in places.items():
        index = torch.tensor([taken, put]).to(first.device)
        gathered.index_copy_(0, index[1], features.index_select(0, index[0]))
    return gathered
