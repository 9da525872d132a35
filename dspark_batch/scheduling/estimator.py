"""How likely drafted tokens are accepted, by draft position and row, as counted so far.

Labels are censored: of a draft of ℓ verified tokens of which n were accepted, positions 0 .. n-1 held, position n (if
there is one) did not, and nothing is known about later ones. So only the conditional chance of a position, given the
earlier ones held, is counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FORGET = 0.99
_ROW_FORGET = 0.9
_ROW_PRIOR = 8.0
_PRIOR = 2.0
_FIRST_CHANCE = 0.7
_MAX_ROW_POWER = 4.0
_EXPECTED_DRAFTS = 24.0
"""Drafts of this job that weigh as much as what was measured before it."""


def seen_slots(num_verified: Ints, num_accepted: Ints) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """[R] verified and accepted tokens -> row, draft position and outcome of every slot with a label, flat [N].

    Those are the verified slots up to and with the first rejected one.
    """
    reached = np.minimum(num_accepted + 1, num_verified)
    row: Ints = np.repeat(np.arange(len(reached)), reached)
    position: Ints = np.arange(len(row)) - np.repeat(np.cumsum(reached) - reached, reached)
    return row, position, position < num_accepted[row]


class AcceptanceHistory:
    """Conditional chances by draft position for the job, bent by how each row does; and how often a draft came at all.

    A position that has been seen little takes the chance of the one before it, so a longer draft is tried as soon as
    the known positions promise it.

    expected: share of drafts that hold up to and with each of the first positions, as measured on other jobs; it counts
    as a few drafts of this one.
    """

    def __init__(self, num_positions: int, expected: Sequence[float] = ()) -> None:
        self._held = np.zeros(num_positions)
        self._tried = np.zeros(num_positions)
        known = _EXPECTED_DRAFTS * np.array(expected[:num_positions], np.float64)
        self._held[: len(known)] = known
        self._tried[: len(known)] = np.concatenate([[_EXPECTED_DRAFTS], known])[: len(known)]
        self._offered = np.zeros(num_positions)
        self._asked = np.zeros(num_positions)
        self._rows: dict[int, tuple[float, float]] = {}

    @property
    def num_labels(self) -> float:
        """What the counts weigh: labels of all positions, faded and expected ones included."""
        return float(self._tried.sum())

    def observe_offers(self, asked: Ints, offered: Ints) -> None:
        """[R] tokens asked of the drafter, and tokens that it drafted."""
        positions = np.arange(len(self._asked))[:, None]
        self._asked = _FORGET * self._asked + (positions < asked).sum(1)
        self._offered = _FORGET * self._offered + (positions < offered).sum(1)

    def observe(self, handles: Sequence[int], num_verified: Ints, num_accepted: Ints) -> None:
        """[R] verified and accepted tokens of each row."""
        if not num_verified.any():
            return
        positions = np.arange(len(self._held))[:, None]
        tried = np.minimum(num_accepted + 1, num_verified)
        self._held = _FORGET * self._held + (positions < num_accepted).sum(1)
        self._tried = _FORGET * self._tried + (positions < tried).sum(1)
        for handle, row_held, row_tried in zip(handles, num_accepted.tolist(), tried.tolist(), strict=True):
            if row_tried:
                held, all_tried = self._rows.get(handle, (0.0, 0.0))
                self._rows[handle] = (_ROW_FORGET * held + row_held, _ROW_FORGET * all_tried + row_tried)

    def keep_only(self, handles: Collection[int]) -> int:
        """Forget rows that have left; gives how many."""
        gone = self._rows.keys() - set(handles)
        for handle in gone:
            del self._rows[handle]
        return len(gone)

    def age(self) -> None:
        """Trust what was counted half as much: drafting paused, and things may have changed."""
        for counts in (self._held, self._tried, self._offered, self._asked):
            counts *= 0.5

    def chances(self) -> Floats:
        """[K] conditional chance of each position for the job."""
        out = np.empty(len(self._held))
        before = _FIRST_CHANCE
        for k, (held, tried) in enumerate(zip(self._held.tolist(), self._tried.tolist(), strict=True)):
            before = out[k] = (held + _PRIOR * before) / (tried + _PRIOR)
        return out

    def offer_rates(self) -> Floats:
        """[K] how often the drafter had a token for a position for which it was asked."""
        rates: Floats = (self._offered + _PRIOR) / (self._asked + _PRIOR)
        return np.minimum.accumulate(rates)

    def survival(self, handles: Sequence[int], num_positions: int) -> Floats:
        """[R, K] chance that a row's draft holds up to and with each position."""
        log_job = np.cumsum(np.log(np.clip(self.chances()[:num_positions], 1e-6, 1 - 1e-6)))
        out: Floats = np.exp(self._powers(handles)[:, None] * log_job[None])
        return out

    def _powers(self, handles: Sequence[int]) -> Floats:
        """[R] exponents that bend the job's survival to each row's; 1 for rows of which nothing is known."""
        if not self._rows:
            return np.ones(len(handles))
        job = (float(self._held.sum()) + _PRIOR * _FIRST_CHANCE) / (float(self._tried.sum()) + _PRIOR)
        job = min(max(job, 1e-3), 1 - 1e-3)
        counts: Floats = np.array([self._rows.get(handle, (0.0, 0.0)) for handle in handles]).reshape(-1, 2)
        own = (counts[:, 0] + _ROW_PRIOR * job) / (counts[:, 1] + _ROW_PRIOR)
        powers: Floats = np.log(np.clip(own, 1e-3, 1 - 1e-3)) / math.log(job)
        return np.clip(powers, 1 / _MAX_ROW_POWER, _MAX_ROW_POWER)
