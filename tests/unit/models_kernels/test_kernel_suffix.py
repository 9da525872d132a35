"""Native lookups of the suffix drafter against those with numpy: the same drafts, to the last bit of a confidence."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.suffix import SuffixConfig, SuffixDrafter
from dspark_batch.drafters.suffix_index import Ints, SuffixIndex
from dspark_batch.drafters.suffix_native import NativeSearch
from dspark_batch.drafters.suffix_search import Drafts, NumpySearch, SearchRules, SuffixSearch
from dspark_batch.models.kernels.library import Kernels

CONFIGS = {
    "default": SuffixConfig(),
    "evicting": SuffixConfig(global_tokens=300, local_tokens=40, max_draft_tokens=5),
    "wrapping": SuffixConfig(global_tokens=90, local_tokens=16, orders=(1, 2, 3), max_candidates=3),
    "eager": SuffixConfig(min_survival=0.0, length_factor=20.0, length_offset=3.7, max_draft_tokens=64),
    "many votes": SuffixConfig(orders=(1, 3), max_candidates=64, length_factor=9.3, length_offset=-1.4),
    "own text only": SuffixConfig(global_tokens=0, orders=(5,)),
}


class TurnTaking:
    """A search that asks one of two at random: they share the arrays."""

    def __init__(self, searches: Sequence[SuffixSearch]) -> None:
        self._searches = searches
        self._rng = random.Random(0)

    def extend(self, index: SuffixIndex, rings: Ints, tokens: Ints, counts: Ints) -> None:
        self._rng.choice(self._searches).extend(index, rings, tokens, counts)

    def clear(self, index: SuffixIndex, ring: int) -> None:
        self._rng.choice(self._searches).clear(index, ring)

    def drafts(self, own: SuffixIndex, shared: SuffixIndex, rings: Ints, max_tokens: Ints) -> Drafts:
        return self._rng.choice(self._searches).drafts(own, shared, rings, max_tokens)


def drafter(config: SuffixConfig, kernels: Kernels, kind: str) -> SuffixDrafter:
    made = SuffixDrafter(config, kernels=kernels if kind == "native" else None)
    if kind == "in turns":
        other = SuffixDrafter(config, kernels=kernels)
        made._search = TurnTaking([made._search, other._search])
    return made


def tokens_of(rng: random.Random, vocab_size: int, phrases: list[list[int]]) -> list[int]:
    if rng.random() < 0.4:
        return [rng.randrange(vocab_size) for _ in range(rng.randrange(9))]
    phrase = rng.choice(phrases)
    first = rng.randrange(len(phrase))
    return phrase[first : first + rng.randrange(30)]


@pytest.mark.parametrize("vocab_size", [2, 7, 150_000])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_native_drafts_are_those_of_numpy(kernels: Kernels, config: SuffixConfig, vocab_size: int) -> None:
    """Rows come and go, some twice, with limits from 0 up; a third drafter changes sides in the middle of its rows."""
    drafters = [drafter(config, kernels, kind) for kind in ("numpy", "native", "in turns")]
    rng = random.Random(vocab_size)
    phrases = [[rng.randrange(vocab_size) for _ in range(40)] for _ in range(4)]
    texts: dict[int, list[int]] = {}
    rows: dict[int, DraftRow] = {}
    num_drafted = 0
    for step in range(120):
        if len(rows) < 20 and rng.random() < 0.6:
            handle = next(h for h in range(21) if h not in rows)
            texts[handle] = [token for _ in range(rng.randrange(1, 9)) for token in tokens_of(rng, vocab_size, phrases)]
            prompt_len = max(1, len(texts[handle]) - rng.randrange(5))
            rows[handle] = DraftRow(handle, 0, SamplingParams(), texts[handle], prompt_len)
            for each in drafters:
                each.add(rows[handle])
        asked = [row for row in rows.values() if rng.random() < 0.9]
        limits = [rng.choice([0, 1, 3, 16, 70]) for _ in asked]
        expected, *others = [each.propose(asked, limits) for each in drafters]
        for block in others:
            assert block.token_ids == expected.token_ids, step
            assert block.confidence == expected.confidence, step
        num_drafted += sum(map(len, expected.token_ids))
        for handle in list(rows):
            texts[handle] += tokens_of(rng, vocab_size, phrases)
            if rng.random() < 0.08:
                finished = rng.random() < 0.7
                for each in drafters:
                    each.remove(rows[handle], finished=finished)
                del rows[handle]
        if step % 20 == 0:
            for each in drafters:
                each.check_integrity()
    assert num_drafted > 100


def test_both_leave_the_same_arrays_behind(kernels: Kernels) -> None:
    rules = SearchRules(max_candidates=8, length_factor=2.0, length_offset=0.0, min_survival=0.1)
    searches: list[SuffixSearch] = [NumpySearch(rules), NativeSearch(rules, kernels, depth=4, max_draft_tokens=16)]
    indexes = [SuffixIndex((2, 4), num_tokens=30, num_rings=3) for _ in searches]
    rng = np.random.default_rng(3)
    for step in range(200):
        rings = rng.permutation(3)[: rng.integers(1, 4)]
        counts = rng.integers(0, indexes[0].room + 1 if step % 9 == 0 else 6, len(rings))
        tokens = rng.integers(-1, 5, int(counts.sum()))
        for search, index in zip(searches, indexes, strict=True):
            search.extend(index, rings, tokens, counts)
            if step % 13 == 0:
                search.clear(index, int(rings[0]))
        first, second = (index.arrays for index in indexes)
        assert (first.tokens == second.tokens).all()
        assert (first.cells == second.cells).all()
        assert (first.newest == second.newest).all()
        assert (first.start == second.start).all()
        assert (first.end == second.end).all()
