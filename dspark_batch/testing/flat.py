"""Drives a target over ragged batches the way an engine does, for comparisons with one-row references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_batch.models.runner import TargetRunner
from dspark_batch.tensors import ForwardBatch, RowSlice


@dataclass(slots=True)
class FlatRow:
    """One sequence on its way through the target. logits: what came back so far, one [V] row per position."""

    token_ids: Sequence[int]
    slot: int
    kv_len: int = 0
    logits: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.kv_len


class FlatDriver:
    """Feeds rows in slices of chosen sizes and keeps the logits of every position.

    poison: fill all dead KV with NaN before every forward, so that reading it shows.
    """

    def __init__(self, target: TargetRunner, *, taps: tuple[int, ...] = (), poison: bool = True) -> None:
        self._target, self._taps, self._poison = target, taps, poison

    def add(self, token_ids: Sequence[int], *, prefix: FlatRow | None = None, prefix_len: int = 0) -> FlatRow:
        """A row with room for exactly its tokens; with ``prefix``, its first positions are read from that row."""
        num_own = len(token_ids) - prefix_len
        slot = self._target.kv.allocate(num_own, prefix=prefix.slot if prefix else None, prefix_len=prefix_len)
        assert slot is not None, f"no room for {num_own} tokens"
        row = FlatRow(token_ids, slot, kv_len=prefix_len)
        if prefix is not None:
            row.logits = list(prefix.logits[:prefix_len])
            row.features = list(prefix.features[:prefix_len])
        return row

    def step(self, rows: Sequence[FlatRow], sizes: Sequence[int]) -> None:
        """One forward: row i advances by ``sizes[i]`` tokens, or by what it has left; finished rows sit out."""
        work = [(row, min(size, row.num_left)) for row, size in zip(rows, sizes, strict=True) if row.num_left]
        if self._poison:
            for row, _ in work:
                self._target.kv.poison(row.slot, row.kv_len)
        flat = [i for row, size in work for i in row.token_ids[row.kv_len : row.kv_len + size]]
        device = self._target.device
        batch = ForwardBatch(
            token_ids=torch.tensor(flat, device=device),
            slices=tuple(RowSlice(row.slot, row.kv_len, size) for row, size in work),
            logit_index=torch.arange(len(flat), device=device),
            taps=self._taps,
        )
        out = self._target.forward(batch)
        logits = list(self._target.logits(out.hidden).cpu())
        features = list(out.features.cpu()) if out.features is not None else []
        for row, size in work:
            row.logits += logits[:size]
            row.features += features[:size]
            del logits[:size], features[:size]
            row.kv_len += size
        self._target.kv.check_integrity()

    def finish(self, rows: Sequence[FlatRow], schedule: Sequence[Sequence[int]]) -> None:
        """Repeat the steps of ``schedule`` (row i takes column i modulo its width) until every row is done."""
        turn = 0
        while any(row.num_left for row in rows):
            sizes = schedule[turn % len(schedule)]
            self.step(rows, [sizes[(i + turn) % len(sizes)] for i in range(len(rows))])
            turn += 1
