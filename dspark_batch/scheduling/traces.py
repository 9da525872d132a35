"""Acceptance traces: what became of every draft of a run, recorded around any policy, kept as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_batch.errors import InputError
from dspark_batch.metrics import PlanReason
from dspark_batch.scheduling.policies import LengthPolicy, RoundLoad, RoundOutcome
from dspark_batch.tensors import DraftBlock, VerifyPlan

FORMAT = "dspark-batch trace"
VERSION = 1
_MAX_ROUNDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRound:
    """One round of all rows. The sequences over rows are as long as ``handles``; a row without a draft has zeros.

    num_offered: tokens that the drafter gave. confidence, margin: per row one number for each of them, or None where
    the drafter has none. Times in seconds, the rest as in ``RoundLoad`` and ``RoundOutcome``.
    """

    handles: tuple[int, ...]
    num_offered: tuple[int, ...]
    num_verified: tuple[int, ...]
    num_accepted: tuple[int, ...]
    num_step_tokens: int
    num_prefill_tokens: int
    draft_s: float
    step_s: float
    context_tokens: float = 0.0
    confidence: tuple[tuple[float, ...], ...] | None = None
    margin: tuple[tuple[float, ...], ...] | None = None


class TraceRecorder:
    """A ``LengthPolicy`` that does what ``inner`` does and notes every round; the oldest are dropped past a limit."""

    def __init__(self, inner: LengthPolicy, *, max_rounds: int = _MAX_ROUNDS) -> None:
        self.inner = inner
        self.rounds: list[RecordedRound] = []
        self._max_rounds = max_rounds
        self._draft: DraftBlock | None = None

    @property
    def reason(self) -> PlanReason:
        return self.inner.reason

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        self._draft = None
        return self.inner.draft_lengths(load)

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        self._draft = draft
        return self.inner.verify_plan(load, draft)

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        draft, self._draft = self._draft, None
        num_rows = len(load.handles)
        if len(self.rounds) >= self._max_rounds:
            del self.rounds[: self._max_rounds // 2]
        self.rounds.append(
            RecordedRound(
                handles=tuple(load.handles),
                num_offered=tuple(len(tokens) for tokens in draft.token_ids) if draft is not None else (0,) * num_rows,
                num_verified=tuple(outcome.num_verified),
                num_accepted=tuple(outcome.num_accepted),
                num_step_tokens=outcome.num_step_tokens,
                num_prefill_tokens=outcome.num_prefill_tokens,
                draft_s=outcome.draft_s,
                step_s=outcome.step_s,
                context_tokens=load.context_tokens,
                confidence=_frozen(draft.confidence) if draft is not None else None,
                margin=_frozen(draft.margin) if draft is not None else None,
            )
        )
        self.inner.observe(load, outcome)


@dataclass(frozen=True, slots=True)
class RowRound:
    """One row's part of a recorded round."""

    num_offered: int
    num_verified: int
    num_accepted: int
    confidence: tuple[float, ...] | None
    margin: tuple[float, ...] | None


def rounds_by_row(rounds: Sequence[RecordedRound]) -> dict[int, list[RowRound]]:
    """Every row's drafted rounds in order, by handle, in the order in which the rows first drafted."""
    out: dict[int, list[RowRound]] = {}
    for recorded in rounds:
        for r, handle in enumerate(recorded.handles):
            if not recorded.num_offered[r]:
                continue
            out.setdefault(handle, []).append(
                RowRound(
                    recorded.num_offered[r],
                    recorded.num_verified[r],
                    recorded.num_accepted[r],
                    recorded.confidence[r] if recorded.confidence is not None else None,
                    recorded.margin[r] if recorded.margin is not None else None,
                )
            )
    return out


def write_trace(path: Path, rounds: Sequence[RecordedRound]) -> None:
    """One JSON object a line: a header, then the rounds."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, "version": VERSION, "num_rounds": len(rounds)}) + "\n")
        for recorded in rounds:
            file.write(json.dumps(asdict(recorded)) + "\n")


def read_trace(path: Path) -> list[RecordedRound]:
    """What :func:`write_trace` wrote.

    Raises:
        InputError: there is no such file, it is no trace of this version, or it was cut off.
    """
    if not path.is_file():
        raise InputError(f"trace {path}: no such file")
    with path.open(encoding="utf-8") as lines:
        header, *rest = _objects(path, lines)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InputError(f"trace {path}: is not a {FORMAT!r} of version {VERSION}; record it again")
    if len(rest) != header["num_rounds"]:
        raise InputError(f"trace {path}: has {len(rest)} rounds of {header['num_rounds']}; it was cut off")
    try:
        return [RecordedRound(**{name: _tuples(value) for name, value in row.items()}) for row in rest]
    except TypeError as error:
        raise InputError(f"trace {path}: a round cannot be read: {error}") from None


def _objects(path: Path, lines: Iterator[str]) -> list[Mapping[str, Any]]:
    out: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"trace {path}, line {number}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"trace {path}, line {number}: is not an object")
        out.append(row)
    return out or [{}]


def _frozen(values: Sequence[Sequence[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if values is None else tuple(tuple(row) for row in values)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
