"""Hybrid: per row and round the draft that promises more, a looked-up one or that of a drafter with a model.

A looked-up draft costs next to nothing, so rows with a strong match skip the other drafter's forward. The choice is
made before that drafter runs, from the match and from earlier rounds: it never depends on a sampled token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_batch.drafters.base import Committed, Drafter, DraftRow, LearningDrafter, MeasuredDrafter
from dspark_batch.tensors import DraftBlock

_FORGET = 0.98
_ROW_FORGET = 0.9
_PRIOR = 4.0
_FIRST_CHANCE = 0.6


class LookupDrafter(Drafter, Protocol):
    """A drafter without a forward: its drafts are one-hot, and it gives a confidence for every token."""


@dataclass(slots=True)
class _Record:
    """Drafted tokens whose outcome is known, and those that held; older ones fade."""

    held: float = 0.0
    tried: float = 0.0

    def add(self, held: float, tried: float, *, forget: float) -> None:
        self.held = forget * self.held + held
        self.tried = forget * self.tried + tried

    def chance(self, prior: float) -> float:
        return (self.held + _PRIOR * prior) / (self.tried + _PRIOR)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row's latest draft: where it began, and who made it."""

    start: int
    token_ids: Sequence[int]
    is_lookup: bool


class HybridDrafter:
    """Fulfils ``drafters.base.Drafter`` with two others that both follow every row.

    It compares its latest drafts with what was committed since, so it knows how long the model's drafts hold, for the
    job and for each row, and how far the lookup's confidences are to be trusted.
    """

    name = "hybrid"

    def __init__(self, lookup: LookupDrafter, model: Drafter) -> None:
        self._lookup = lookup
        self._model = model
        self.max_draft_tokens = max(lookup.max_draft_tokens, model.max_draft_tokens)
        self._rows: dict[int, _Record] = {}
        self._latest: dict[int, _Draft] = {}
        self._job = _Record()
        self._trust = _Record()
        self._promised: dict[int, float] = {}

    @property
    def expected_survival(self) -> Sequence[float]:
        """The model's; where looked-up drafts take its place they are thought to be no worse."""
        return self._model.expected_survival if isinstance(self._model, MeasuredDrafter) else ()

    @property
    def learns_from_finished(self) -> bool:
        """Whether one of the two does."""
        return any(isinstance(d, LearningDrafter) and d.learns_from_finished for d in (self._lookup, self._model))

    @property
    def taps(self) -> tuple[int, ...]:
        return self._model.taps

    def add(self, row: DraftRow) -> None:
        self._lookup.add(row)
        self._model.add(row)
        self._rows[row.handle] = _Record()

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        self._model.observe(committed, features)

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        self._judge(row)
        self._lookup.remove(row, finished=finished)
        self._model.remove(row, finished=finished)
        del self._rows[row.handle]

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        for row in rows:
            self._judge(row)
        found = self._lookup.propose(rows, max_tokens)
        assert found.confidence is not None, f"{self._lookup.name} gives no confidences"
        promises = [_expected_length(chances) for chances in found.confidence]
        trust = self._trust.chance(1.0)
        takes_lookup = [
            bool(found.token_ids[r]) and trust * promises[r] >= self._expected_of_model(row, max_tokens[r])
            for r, row in enumerate(rows)
        ]
        asked = [0 if takes else limit for takes, limit in zip(takes_lookup, max_tokens, strict=True)]
        made = self._model.propose(rows, asked) if any(asked) else DraftBlock(token_ids=[()] * len(rows))
        token_ids: list[Sequence[int]] = []
        confidence: list[Sequence[float]] = []
        margin: list[Sequence[float]] = []
        for r, row in enumerate(rows):
            is_lookup = not made.token_ids[r]
            tokens = found.token_ids[r] if is_lookup else made.token_ids[r]
            token_ids.append(tokens)
            if is_lookup:
                confidence.append(found.confidence[r])
            elif made.confidence is not None:
                confidence.append(made.confidence[r])
            else:
                confidence.append([self._chance(row)] * len(tokens))
            margin.append([math.nan] * len(tokens) if is_lookup or made.margin is None else made.margin[r])
            if tokens:
                self._latest[row.handle] = _Draft(len(row.token_ids), tokens, is_lookup)
                self._promised[row.handle] = promises[r]
        return DraftBlock(token_ids=token_ids, probs=made.probs, confidence=confidence, margin=margin)

    def check_integrity(self) -> None:
        assert self._latest.keys() <= self._rows.keys(), "a draft of a row that has left"
        self._lookup.check_integrity()
        self._model.check_integrity()

    def _chance(self, row: DraftRow) -> float:
        """That one token of the model's draft holds on this row."""
        return self._rows[row.handle].chance(self._job.chance(_FIRST_CHANCE))

    def _expected_of_model(self, row: DraftRow, limit: int) -> float:
        return _expected_length([self._chance(row)] * min(limit, self._model.max_draft_tokens))

    def _judge(self, row: DraftRow) -> None:
        """Learn from the row's latest draft, as far as the tokens committed since tell; a prompt's tell nothing."""
        latest = self._latest.pop(row.handle, None)
        if latest is None:
            return
        promised = self._promised.pop(row.handle)
        if latest.start < row.prompt_len:
            return
        committed = row.token_ids[latest.start : latest.start + len(latest.token_ids)]
        pairs = zip(latest.token_ids, committed, strict=False)
        num_held = next((k for k, (drafted, token) in enumerate(pairs) if drafted != token), len(committed))
        has_failed = num_held < len(committed)
        if not latest.is_lookup:
            tried = num_held + has_failed
            self._job.add(num_held, tried, forget=_FORGET)
            self._rows[row.handle].add(num_held, tried, forget=_ROW_FORGET)
        elif has_failed or num_held == len(latest.token_ids):
            self._trust.add(min(num_held, promised), promised, forget=_FORGET)


def _expected_length(chances: Sequence[float]) -> float:
    """Expected number of tokens that hold, by the chance of each given those before it."""
    total, survival = 0.0, 1.0
    for chance in chances:
        survival *= chance
        total += survival
    return total
