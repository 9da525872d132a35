"""The drafter's memory per row: keys and values of every draft layer for the row's committed positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_batch.extents import ExtentPool


@dataclass(slots=True, eq=False)
class RowContext:
    """One row's memory: pool tokens start .. start+capacity-1; the first ``length`` hold positions 0 .. length-1.

    What lies past ``length`` is dead: a block writes its own keys and values there while it attends. pending: features
    of the positions that follow, [n, taps*H] each, not projected yet.
    """

    start: int
    capacity: int
    length: int = 0
    pending: list[Tensor] = field(default_factory=list)
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
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self._pool = ExtentPool(num_tokens)
        self._rows: dict[int, RowContext] = {}
        self._pending_limit_bytes = pending_limit_bytes
        self._storages: dict[int, int] = {}

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
        return sum(self._storages.values()) > self._pending_limit_bytes

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
            if row.pending:
                self._count_storages()

    def append(self, row: RowContext, features: Tensor) -> None:
        """Keep features of the positions from ``row.num_known`` on; they are not copied."""
        row.pending.append(features)
        row.num_pending += features.shape[0]
        storage = features.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()

    def take_pending(self, rows: Sequence[RowContext]) -> list[Tensor]:
        """The waiting features of the rows, in order; the positions count as held from now on."""
        taken: list[Tensor] = []
        for row in rows:
            taken += row.pending
            row.length += row.num_pending
            row.pending, row.num_pending = [], 0
        self._count_storages()
        return taken

    def check_integrity(self) -> None:
        """Holes and extents tile the pool, no two holes touch, and every row stays within its extent."""
        self._pool.check_integrity((row.start, row.capacity) for row in self._rows.values())
        for handle, row in self._rows.items():
            assert row.num_known <= row.capacity, f"row {handle} knows {row.num_known} positions of {row.capacity}"
            assert row.num_pending == sum(part.shape[0] for part in row.pending), f"row {handle} miscounts its features"

    def _count_storages(self) -> None:
        parts = [part for row in self._rows.values() for part in row.pending]
        self._storages = {s.data_ptr(): s.nbytes() for s in (part.untyped_storage() for part in parts)}
