"""Labels for drafted tokens that nobody verified: plain decoding shows by itself what they were worth.

A token that was cut would have been accepted exactly where the row then emits it anyway, if verification is coupled or
the draft one-hot. So a draft can be judged for the price of drafting alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.policies import RoundOutcome
from dspark_batch.scheduling.survival import FlatDraft, SurvivalModel
from dspark_batch.tensors import DraftBlock

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """num_tried, num_held: [D] of each draft, how many positions are known and how many of them held."""

    num_tried: Ints
    num_held: Ints


class ShadowDrafts:
    """The drafts of one probe, followed until every row has left its draft or come to its end."""

    def __init__(self, handles: Sequence[int], drafts: Sequence[Sequence[int]]) -> None:
        self._drafts = drafts
        self._live: dict[int, int] = {handle: d for d, handle in enumerate(handles) if drafts[d]}
        self._num_held = np.zeros(len(drafts), np.int64)
        self._num_tried = np.zeros(len(drafts), np.int64)

    @property
    def is_settled(self) -> bool:
        return not self._live

    def follow(self, emitted: Mapping[int, Sequence[int]]) -> None:
        """What each row emitted, by handle. A row that is not in it has left: the rest of its draft stays unknown."""
        for handle, d in list(self._live.items()):
            draft = self._drafts[d]
            tokens = emitted.get(handle)
            if tokens is None:
                del self._live[handle]
                continue
            for token in tokens:
                self._num_tried[d] += 1
                if token != draft[self._num_held[d]]:
                    del self._live[handle]
                    break
                self._num_held[d] += 1
                if self._num_held[d] == len(draft):
                    del self._live[handle]
                    break

    def outcome(self) -> Outcome:
        return Outcome(self._num_tried, self._num_held)


@dataclass(slots=True, eq=False)
class _Watched:
    handles: Sequence[int]
    flat: FlatDraft
    shadow: ShadowDrafts


class ShadowLabels:
    """Whole rounds of shadow drafts. What is settled goes to the survival model."""

    def __init__(self, model: SurvivalModel) -> None:
        self._model = model
        self._watched: list[_Watched] = []

    def follow(self, handles: Sequence[int], emitted: Sequence[Sequence[int]] | None) -> None:
        """Call once per round with what every row emitted; None ends all that are watched."""
        if not self._watched:
            return
        by_handle = {} if emitted is None else dict(zip(handles, emitted, strict=True))
        waiting: list[_Watched] = []
        for watched in self._watched:
            watched.shadow.follow(by_handle)
            if not watched.shadow.is_settled:
                waiting.append(watched)
                continue
            found = watched.shadow.outcome()
            self._model.observe(watched.handles, watched.flat, found.num_tried, found.num_held)
        self._watched = waiting

    def watch(
        self, handles: Sequence[int], draft: DraftBlock, flat: FlatDraft, emitted: Sequence[Sequence[int]]
    ) -> None:
        """A draft of this round, and what the rows emitted in it."""
        shadow = ShadowDrafts(handles, draft.token_ids)
        shadow.follow(dict(zip(handles, emitted, strict=True)))
        self._watched.append(_Watched(handles, flat, shadow))


def labels_of_round(
    draft: DraftBlock, flat: FlatDraft, outcome: RoundOutcome, *, may_follow: bool
) -> tuple[Ints, Ints]:
    """[R] drafted positions whose outcome a round showed, and how many of them held.

    Where a row's draft was cut and all that was verified held, the token after it tells about the first one cut, if
    emitted tokens are labels at all (``may_follow``).
    """
    verified = np.array(outcome.num_verified, np.int64)
    held = np.minimum(np.array(outcome.num_accepted, np.int64), verified)
    tried = np.minimum(held + 1, verified)
    if may_follow and outcome.emitted is not None:
        for r in np.flatnonzero((held == verified) & (verified < flat.offered)).tolist():
            at, emitted = int(verified[r]), outcome.emitted[r]
            if len(emitted) > at:
                tried[r] += 1
                held[r] += emitted[at] == draft.token_ids[r][at]
    return tried, held
