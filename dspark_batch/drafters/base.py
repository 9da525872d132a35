"""The one interface of all drafters, present and to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dspark_batch.core import SamplingParams
from dspark_batch.tensors import DraftBlock


@dataclass(frozen=True, slots=True, eq=False)
class DraftRow:
    """A row as a drafter sees it.

    handle: stable for the row's life in the engine. noise_key: 64-bit key of (seed, request id, sample): the same noise
    that verification uses. token_ids: prompt and committed output, the anchor last; a live view that grows, never to be
    written. prompt_len: how many of them are prompt.
    """

    handle: int
    noise_key: int
    sampling: SamplingParams
    token_ids: Sequence[int]
    prompt_len: int


class Committed(NamedTuple):
    """What a step committed of a row: the tokens at positions start .. start+num_tokens-1. Their features are those
    of the step from ``offset`` on."""

    row: DraftRow
    start: int
    num_tokens: int
    offset: int


class Drafter(Protocol):
    """Proposes tokens. The engine calls, for a row: ``add`` once, then per round ``propose`` (or not), and ``remove``
    at its end; and ``observe`` for all rows of a step where there are taps. A drafter's per-row state has the committed
    length and sees features of accepted tokens only (invariant 5)."""

    @property
    def name(self) -> str: ...

    @property
    def max_draft_tokens(self) -> int:
        """γ: the longest draft this drafter makes."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs ``observe`` wants as features; () for none."""
        ...

    def add(self, row: DraftRow) -> None: ...

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        """Draft up to ``max_tokens[r]`` tokens for each row (0: none). The rows' anchors are ``token_ids[-1]``."""
        ...

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        """Tokens whose KV became committed in a step with ``features`` [T, taps*H].

        Called after every step, prefill or round, with accepted positions only; never for a drafter without taps.
        """
        ...

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        """The row has left. ``finished``: its output is complete (and may teach the drafter)."""
        ...

    def check_integrity(self) -> None: ...


@runtime_checkable
class MeasuredDrafter(Protocol):
    """A drafter that was measured before this job."""

    @property
    def expected_survival(self) -> Sequence[float]:
        """Share of its drafts that held up to and with each position; () where that is not known."""
        ...


@runtime_checkable
class LearningDrafter(Protocol):
    """A drafter that rows teach: its drafts get better, or worse, as rows finish."""

    @property
    def learns_from_finished(self) -> bool: ...
