"""From rings to drafts: for each row the better of what its own ring and the ring of finished rows would draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.suffix_choice import choose
from dspark_batch.drafters.suffix_index import Ints, SuffixIndex

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRules:
    """The part of ``SuffixConfig`` that says which drafts are made."""

    max_candidates: int
    length_factor: float
    length_offset: float
    min_survival: float


@dataclass(frozen=True, slots=True)
class Drafts:
    """num_tokens: [R] length of each row's draft. token_ids, confidence: [R, K], undefined past that length."""

    num_tokens: Ints
    token_ids: Ints
    confidence: Floats


class SuffixSearch(Protocol):
    """Works on the arrays of an index, so that two of these can take turns."""

    def extend(self, index: SuffixIndex, rings: Ints, tokens: Ints, counts: Ints) -> None:
        """As ``SuffixIndex.extend``."""
        ...

    def clear(self, index: SuffixIndex, ring: int) -> None:
        """As ``SuffixIndex.clear``."""
        ...

    def drafts(self, own: SuffixIndex, shared: SuffixIndex, rings: Ints, max_tokens: Ints) -> Drafts:
        """Drafts for the ends of ``rings`` [R] of ``own``, at most ``max_tokens`` [R] long, at least 1 each.

        Candidates come from the row's own ring, or from the first ring of ``shared`` where that promises more.
        """
        ...


class NumpySearch:
    """Fulfils ``SuffixSearch`` without native code."""

    def __init__(self, rules: SearchRules) -> None:
        self._rules = rules

    def extend(self, index: SuffixIndex, rings: Ints, tokens: Ints, counts: Ints) -> None:
        index.extend(rings, tokens, counts)

    def clear(self, index: SuffixIndex, ring: int) -> None:
        index.clear(ring)

    def drafts(self, own: SuffixIndex, shared: SuffixIndex, rings: Ints, max_tokens: Ints) -> Drafts:
        rules, num_rows = self._rules, len(rings)
        before = own.before(rings, own.end[rings])
        places = ((own, rings), (shared, np.zeros_like(rings)))
        found = [index.occurrences(at, before, limit=rules.max_candidates)[0] for index, at in places]
        matches = np.concatenate(
            [index.match_lengths(at, before, hits) for (index, at), hits in zip(places, found, strict=True)]
        )
        reach = int(rules.length_factor * matches.max() + rules.length_offset)
        longest = max(1, min(int(max_tokens.max()), reach))
        choice = choose(
            np.concatenate(
                [index.continuations(at, hits, longest) for (index, at), hits in zip(places, found, strict=True)]
            ),
            matches,
            max_tokens=np.tile(max_tokens, 2),
            length_factor=rules.length_factor,
            length_offset=rules.length_offset,
            min_survival=rules.min_survival,
        )
        promises_more = choice.expected[num_rows:] > choice.expected[:num_rows]
        best = np.arange(num_rows) + num_rows * promises_more
        return Drafts(choice.num_tokens[best], choice.token_ids[best], choice.confidence[best])
