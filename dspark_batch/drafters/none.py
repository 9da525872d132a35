"""The drafter that never drafts: plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.tensors import DraftBlock


class NoDrafter:
    """Proposes nothing for any row."""

    name = "none"
    max_draft_tokens = 0
    taps: tuple[int, ...] = ()

    def add(self, row: DraftRow) -> None: ...

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        return DraftBlock(token_ids=[()] * len(rows))

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None: ...

    def remove(self, row: DraftRow, *, finished: bool) -> None: ...

    def check_integrity(self) -> None: ...
