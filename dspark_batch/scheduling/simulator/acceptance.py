"""Which drafts hold in the simulator: as recorded, or by a parametric model of rows that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.errors import InputError
from dspark_batch.scheduling.traces import RecordedRound, RowRound, rounds_by_row

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedDrafts:
    """One drafting call for R rows. num_offered: [R]. num_held: [R], leading tokens that the target would accept.

    confidence, margin: per row one number for each offered token, or None.
    """

    num_offered: Ints
    num_held: Ints
    confidence: list[list[float]] | None = None
    margin: list[list[float]] | None = None


class AcceptanceModel(Protocol):
    """Makes drafts. A row's next draft does not depend on how its last one was cut."""

    @property
    def num_positions(self) -> int:
        """γ: the longest draft."""
        ...

    def draft(self, rows: Sequence[int], lengths: Ints) -> SimulatedDrafts:
        """rows: numbers of the rows in the job. lengths: [R], tokens asked of each; 0 drafts nothing."""
        ...


class ParametricAcceptance:
    """Conditional chances by position, bent by the row, by the place in its text and by the token.

    chances: [γ], of an ordinary row. row_spread, round_spread, token_spread: standard deviations, on the logit scale,
    of a row's ease, of a draft's and of a token's. confidence_noise: of what a confidence head says about the logit;
    None for a drafter without one. groups: ease added to the rows of each group, row r being in group r mod their
    number, for jobs whose rows differ.
    """

    def __init__(
        self,
        chances: Sequence[float],
        *,
        row_spread: float = 0.5,
        round_spread: float = 0.5,
        token_spread: float = 0.7,
        confidence_noise: float | None = 0.5,
        groups: Sequence[float] = (0.0,),
        seed: int = 0,
    ) -> None:
        clipped = np.clip(np.array(chances, float), 1e-4, 1 - 1e-4)
        self._logits: Floats = np.log(clipped) - np.log1p(-clipped)
        self._spreads = (row_spread, round_spread, token_spread)
        self._confidence_noise = confidence_noise
        self._groups = np.array(groups, float)
        self._seed = seed
        self._random = np.random.default_rng(seed)
        self._ease: dict[int, float] = {}

    @property
    def num_positions(self) -> int:
        return len(self._logits)

    def draft(self, rows: Sequence[int], lengths: Ints) -> SimulatedDrafts:
        num_rows, num_positions = len(rows), self.num_positions
        _, round_spread, token_spread = self._spreads
        ease = np.array([self._ease_of(row) for row in rows])
        place = self._random.normal(0.0, round_spread, (num_rows, 1))
        token = self._random.normal(0.0, token_spread, (num_rows, num_positions))
        logits = self._logits + ease[:, None] + place + token
        holds = self._random.random((num_rows, num_positions)) < _sigmoid(logits)
        offered = np.minimum(lengths, num_positions)
        held = np.minimum(np.cumprod(holds, axis=1).sum(1), offered)
        confidence = None
        if self._confidence_noise is not None:
            said = _sigmoid(logits + self._random.normal(0.0, self._confidence_noise, logits.shape)).tolist()
            confidence = [row[:length] for row, length in zip(said, offered.tolist(), strict=True)]
        return SimulatedDrafts(offered, held, confidence)

    def _ease_of(self, row: int) -> float:
        """A function of the row's number, so that every schedule meets the same rows."""
        if row not in self._ease:
            own = np.random.default_rng((self._seed, row)).normal(0.0, self._spreads[0])
            self._ease[row] = float(self._groups[row % len(self._groups)] + own)
        return self._ease[row]


class TraceAcceptance:
    """Replays recorded rounds: simulated row r goes through the drafts of recorded row ``first_row`` + r, again and
    again.

    A draft is cut to what is asked for; one that was recorded shorter stays short. Where a schedule skips rounds, or
    cuts drafts, a row meets its recorded drafts at other places of its text than they were made at: the order is kept,
    the place is not.

    Raises:
        InputError: the trace holds no drafts, or drafts that were cut before verification, whose outcome is unknown.
    """

    def __init__(self, rounds: Sequence[RecordedRound], *, first_row: int = 0) -> None:
        self._first_row = first_row
        self._rows = list(rounds_by_row(rounds).values())
        if not self._rows:
            raise InputError("the trace holds no drafts; record a run that drafts")
        if any(draft.num_verified < draft.num_offered for row in self._rows for draft in row):
            raise InputError("the trace holds drafts that were cut before they were verified; record schedule=fixed")
        drafts = [draft for row in self._rows for draft in row]
        self.num_positions = max(draft.num_offered for draft in drafts)
        self._has_confidence = all(draft.confidence is not None for draft in drafts)
        self._has_margin = all(draft.margin is not None for draft in drafts)
        self._next: dict[int, int] = {}

    def draft(self, rows: Sequence[int], lengths: Ints) -> SimulatedDrafts:
        drafts = [self._take(row) if length else None for row, length in zip(rows, lengths.tolist(), strict=True)]
        offered = np.minimum(lengths, [0 if draft is None else draft.num_offered for draft in drafts])
        held = np.minimum(offered, [0 if draft is None else draft.num_accepted for draft in drafts])
        confidence = [
            [] if draft is None else list((draft.confidence or ())[:length])
            for draft, length in zip(drafts, offered.tolist(), strict=True)
        ]
        margin = [
            [] if draft is None else list((draft.margin or ())[:length])
            for draft, length in zip(drafts, offered.tolist(), strict=True)
        ]
        return SimulatedDrafts(
            offered, held, confidence if self._has_confidence else None, margin if self._has_margin else None
        )

    def _take(self, row: int) -> RowRound:
        drafts = self._rows[(self._first_row + row) % len(self._rows)]
        number = self._next.get(row, 0)
        self._next[row] = number + 1
        return drafts[number % len(drafts)]


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(-x))
    return out
