"""The chance that drafted tokens stand: before the draft by acceptance history, after it by what the drafter says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.estimator import AcceptanceHistory, seen_slots
from dspark_batch.scheduling.logistic import PositionLogistic, draft_features, prior_weights, token_features
from dspark_batch.tensors import DraftBlock

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEW_TOKENS = 64
"""Drafted tokens of a round up to which loops in Python are faster than calls into numpy."""


@dataclass(frozen=True, slots=True, eq=False)
class FlatDraft:
    """The drafted tokens of a round in one row after another, N in all.

    offered: [R] tokens of each row. row, position: [N]. features: [N, D] of what the drafter says of each token, or
    None where it says nothing.
    """

    offered: Ints
    row: Ints
    position: Ints
    features: Floats | None

    @classmethod
    def of(cls, draft: DraftBlock) -> FlatDraft:
        offered = np.fromiter(map(len, draft.token_ids), np.int64, len(draft.token_ids))
        position, features = positions(offered), None
        if draft.confidence is not None or draft.margin is not None:
            features = few_features(draft) if len(position) <= FEW_TOKENS else many_features(draft, position)
        return cls(offered, np.repeat(np.arange(len(offered)), offered), position, features)


def many_features(draft: DraftBlock, position: Ints) -> Floats:
    """[N, D] of all tokens that the drafter said something of, column by column."""
    confidence, margin = (_flat(said, len(position)) for said in (draft.confidence, draft.margin))
    return token_features(position, confidence=confidence, margin=margin)


def few_features(draft: DraftBlock) -> Floats:
    """As :func:`many_features`, token by token."""
    rows = [features for of_row in _features_by_row(draft) for features in of_row]
    has_both = draft.confidence is not None and draft.margin is not None
    num_columns = 6 if has_both else 2 + (draft.margin is not None)
    return np.array(rows, np.float64).reshape(len(rows), num_columns)


class SurvivalModel:
    """Predicts and learns, for drafters with a confidence, with a margin, or with neither.

    num_positions: γ. expected: as for :class:`AcceptanceHistory`. num_labels: seen so far, expected ones included.
    """

    def __init__(self, num_positions: int, expected: Sequence[float] = ()) -> None:
        self._num_positions = num_positions
        self.history = AcceptanceHistory(num_positions, expected)
        self._curves: PositionLogistic | None = None
        self.num_labels = int(self.history.num_labels)

    @property
    def has_signal(self) -> bool:
        """Whether the drafter says something about its tokens; False before its first draft."""
        return self._curves is not None

    def see(self, draft: DraftBlock, flat: FlatDraft, asked: Ints) -> None:
        """Call once for every draft. asked: [R] tokens that were asked for."""
        if flat.features is not None and self._curves is None:
            prior = prior_weights(has_confidence=draft.confidence is not None, has_margin=draft.margin is not None)
            self._curves = PositionLogistic(self._num_positions, prior)
        if asked.any():
            self.history.observe_offers(asked, flat.offered)

    def of_draft(self, handles: Sequence[int], flat: FlatDraft) -> Floats:
        """[N] chance that each drafted token stands with all before it in its row; never rises within a row."""
        if flat.features is None or self._curves is None:
            by_position = self.history.survival(handles, self._num_positions)
            return by_position[flat.row, flat.position]
        chances = self._curves.chances(flat.features, flat.position)
        return running_product(chances, flat.offered)

    def lengths_above(self, draft: DraftBlock, least_survival: Sequence[float]) -> list[int]:
        """[R] tokens of each row that stand with at least its chance in ``least_survival``, by :meth:`of_draft`; all
        where the drafter says nothing."""
        if self._curves is None or (draft.confidence is None and draft.margin is None):
            return list(map(len, draft.token_ids))
        rows = zip(_features_by_row(draft), least_survival, strict=True)
        return [self._curves.num_above(of_row, least) for of_row, least in rows]

    def age(self) -> None:
        """Trust what was counted half as much: things may have changed."""
        self.history.age()
        if self._curves is not None:
            self._curves.age()

    def observe(self, handles: Sequence[int], flat: FlatDraft, num_tried: Ints, num_held: Ints) -> None:
        """[R] positions of each row whose outcome is known, and how many of them held."""
        self.num_labels += int(num_tried.sum())
        self.history.observe(handles, num_tried, num_held)
        if flat.features is not None and self._curves is not None:
            row, position, held = seen_slots(num_tried, num_held)
            first = np.cumsum(flat.offered) - flat.offered
            self._curves.observe(flat.features[first[row] + position], position, held)


def _features_by_row(draft: DraftBlock) -> Iterator[Iterator[list[float]]]:
    confidence = repeat(None) if draft.confidence is None else draft.confidence
    margin = repeat(None) if draft.margin is None else draft.margin
    return (draft_features(*said) for said in zip(confidence, margin, strict=False))


def _flat(said: Sequence[Sequence[float]] | None, count: int) -> Floats | None:
    return None if said is None else np.fromiter(chain.from_iterable(said), np.float64, count)


def positions(lengths: Ints) -> Ints:
    """Ragged lengths -> 0 .. n-1 for each, in one flat array."""
    first = np.cumsum(lengths) - lengths
    out: Ints = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    return out


def running_product(chances: Floats, lengths: Ints) -> Floats:
    """Products over each row's chances, flat; chances above 1 count as 1, so that they never rise within a row."""
    place = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    dense = np.ones(place.shape)
    dense[place] = np.clip(chances, 0.0, 1.0)
    out: Floats = np.cumprod(dense, axis=1, dtype=np.float64)[place]
    return out
