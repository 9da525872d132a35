"""Probes of a closed gate: drafts that are made to see what drafting would save, and what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_batch.scheduling.cost import DraftCost, Seen
from dspark_batch.scheduling.lengths import CHEAP_DRAFT
from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome
from dspark_batch.scheduling.prices import Prices
from dspark_batch.scheduling.rounds import DraftedRound
from dspark_batch.scheduling.shadow import ShadowLabels
from dspark_batch.scheduling.survival import FlatDraft, SurvivalModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PROBED_SHARE = 8
_HARDLY_DEARER = 1.5
_PROBES_PER_CHECK = 4
_CHECKED_SHARE = 0.5
"""Of a plain step, that the tokens of a check may take."""

SHORT_DRAFT_TOKENS = 4
"""Of a row, where a draft has to be verified to learn from it, or nothing is known yet."""


class Probes:
    """may_use_draft: as for ``AutoLength``. sees_tokens: whether the latest round told what rows emit. Where emitted
    tokens are labels for drafted ones, probes are followed and need not be verified."""

    def __init__(self, prices: Prices, draft_cost: DraftCost, model: SurvivalModel, *, may_use_draft: bool) -> None:
        self._prices, self._draft_cost, self._model = prices, draft_cost, model
        self._may_use_draft = may_use_draft
        self._shadows = ShadowLabels(model)
        self._num_probes = 0
        self.sees_tokens = True

    def follow(self, handles: Sequence[int], emitted: Sequence[Sequence[int]] | None) -> None:
        """Call once per round with what every row emitted; None where nobody knows."""
        self.sees_tokens = emitted is not None
        self._shadows.follow(handles, emitted)

    def lengths(self, load: RoundLoad, limits: Ints, worth: Floats | None) -> Ints:
        """[R] full drafts for all rows where that costs next to nothing, else for a few: those of most ``worth``, or in
        turn."""
        num_rows = len(limits)
        able, longest = np.flatnonzero(limits), int(limits.max())
        count = max(1, num_rows // _PROBED_SHARE)
        has_free_labels = self._may_use_draft and self.sees_tokens
        if has_free_labels and self._draft_cost.is_known:
            all_s, few_s = (self._draft_cost.seconds(n, longest) for n in (num_rows, count))
            if all_s < max(CHEAP_DRAFT * self._prices.plain_s(load), _HARDLY_DEARER * few_s):
                count = num_rows
        if worth is not None:
            by_rank = able[np.argsort(-worth[able], kind="stable")]
        else:
            by_rank = np.roll(able, -(self._num_probes * count) % len(able))
        self._num_probes += 1
        chosen, lengths = by_rank[:count], np.zeros_like(limits)
        lengths[chosen] = limits[chosen]
        # Without labels from emitted tokens, what is drafted is verified to learn from it.
        return lengths if has_free_labels else np.minimum(lengths, SHORT_DRAFT_TOKENS)

    def lengths_to_check(self, load: RoundLoad, flat: FlatDraft) -> Ints:
        """[R] drafted tokens to verify for nothing but their cost: a few, now and then while such a size was not seen,
        and whenever it was not as expected. While a gate is closed, a table that has tokens too dear would not be found
        out."""
        num_rows, plain_s = len(load.handles), self._prices.plain_s(load)
        extra_s = self._prices.step_seconds(load)(np.arange(1.0, len(flat.row) + 1)) - plain_s
        count = max(1, int(np.searchsorted(extra_s, _CHECKED_SHARE * plain_s, side="right")))
        seen, is_turn = self._prices.seen(load, count), self._num_probes % _PROBES_PER_CHECK == 0
        is_due = seen is Seen.DIFFERENT or (seen is Seen.NEVER and is_turn)
        lengths: Ints = np.bincount(flat.row[: count * is_due], minlength=num_rows)
        return lengths

    def learn(self, load: RoundLoad, probe: DraftedRound, outcome: RoundOutcome) -> None:
        """Follow the draft from now on, or learn from what of it was verified; then its promise is known too."""
        assert probe.flat is not None, "the round has drafted"
        assert probe.draft is not None, "the round has drafted"
        if probe.may_follow and outcome.emitted is not None:
            self._shadows.watch(load.handles, probe.draft, probe.flat, outcome.emitted)
            return
        self._model.observe(load.handles, probe.flat, *probe.labels(outcome, may_follow=False))
        if len(probe.flat.row):
            value = probe.value(self._model.of_draft(load.handles, probe.flat))
            probe.promise = self._prices.promise(load, probe.asked, value, worth=probe.worth)
