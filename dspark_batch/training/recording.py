"""A drafter that notes what became of every draft, by comparing it with the tokens that its row then committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dspark_batch.drafters.base import Committed, Drafter, DraftRow
from dspark_batch.tensors import DraftBlock


@dataclass(frozen=True, slots=True)
class DraftedRound:
    """One row's draft. num_accepted: leading tokens that stand. num_known: leading tokens of which it is known whether
    they would stand, the first rejected one included; those past the row's end are not. confidence: as drafted."""

    num_drafted: int
    num_accepted: int
    num_known: int
    confidence: tuple[float, ...] = ()


@dataclass(slots=True)
class _Open:
    """A draft whose outcome is not known yet: it continued the first ``start`` tokens of its row."""

    start: int
    token_ids: tuple[int, ...]
    confidence: tuple[float, ...]


@dataclass(slots=True)
class RecordingDrafter:
    """Passes everything on to ``inner``. Exact where all drafted tokens are verified in coupled mode or greedily."""

    inner: Drafter
    rounds: list[DraftedRound] = field(default_factory=list)
    _open: dict[int, _Open] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def max_draft_tokens(self) -> int:
        return self.inner.max_draft_tokens

    @property
    def taps(self) -> tuple[int, ...]:
        return self.inner.taps

    def add(self, row: DraftRow) -> None:
        self.inner.add(row)

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        for row in rows:
            self._close(row)
        block = self.inner.propose(rows, max_tokens)
        for r, row in enumerate(rows):
            if block.token_ids[r]:
                confidence = tuple(block.confidence[r]) if block.confidence is not None else ()
                self._open[row.handle] = _Open(len(row.token_ids), tuple(block.token_ids[r]), confidence)
        return block

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        self.inner.observe(committed, features)

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        if finished:
            self._close(row)
        self._open.pop(row.handle, None)
        self.inner.remove(row, finished=finished)

    def check_integrity(self) -> None:
        self.inner.check_integrity()

    def _close(self, row: DraftRow) -> None:
        draft = self._open.pop(row.handle, None)
        if draft is None:
            return
        after = list(row.token_ids[draft.start :])
        pairs = zip(draft.token_ids, after, strict=False)
        accepted = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if accepted is None:
            accepted = known = min(len(draft.token_ids), len(after))
        else:
            known = accepted + 1
        self.rounds.append(DraftedRound(len(draft.token_ids), accepted, known, draft.confidence))
