from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from dspark_batch.drafters.suffix_choice import choose
from dspark_batch.drafters.suffix_index import NO_TOKEN, SuffixIndex

ORDERS = (2, 3, 5)
DEPTH = 5
ROOM = 5000


def brute_occurrences(text: Sequence[int], first: int, limit: int) -> tuple[list[int], int]:
    """Newest positions in text[first:] at which the longest indexed context of the text's end occurred before."""
    for order in reversed(ORDERS):
        context = text[-order:]
        if len(text) < order or NO_TOKEN in context:
            continue
        found = [p for p in range(max(first, order), len(text)) if text[p - order : p] == context]
        found = [p for p in found if text[p] != NO_TOKEN]
        if found:
            return found[::-1][:limit], order
    return [], 0


def brute_match(text: Sequence[int], position: int) -> int:
    length = 0
    while length < min(DEPTH, position) and text[position - 1 - length] == text[-1 - length] != NO_TOKEN:
        length += 1
    return length


def brute_continuation(text: Sequence[int], position: int, length: int) -> list[int]:
    out = list(text[position : position + length])
    if NO_TOKEN in out:
        out = out[: out.index(NO_TOKEN)]
    return out + [NO_TOKEN] * (length - len(out))


def grow(index: SuffixIndex, texts: dict[int, list[int]], pieces: dict[int, list[int]]) -> None:
    rings = np.array(list(pieces))
    index.extend(
        rings,
        np.array([token for piece in pieces.values() for token in piece], np.int64),
        np.array([len(piece) for piece in pieces.values()]),
    )
    for ring, piece in pieces.items():
        texts[ring] += piece


def check(index: SuffixIndex, texts: dict[int, list[int]], *, limit: int) -> int:
    """Compare every query with brute force; gives how many had an occurrence."""
    rings = np.array(list(texts))
    before = index.before(rings, index.end[rings])
    positions, orders = index.occurrences(rings, before, limit=limit)
    matches = index.match_lengths(rings, before, positions)
    continuations = index.continuations(rings, positions, 7)
    for q, (ring, text) in enumerate(texts.items()):
        expected, order = brute_occurrences(text, int(index.start[ring]), limit)
        assert positions[q].tolist() == expected + [-1] * (limit - len(expected))
        assert orders[q] == order
        for m, position in enumerate(expected):
            assert matches[q, m] == brute_match(text, position)
            assert continuations[q, m].tolist() == brute_continuation(text, position, 7)
    return int((orders > 0).sum())


@pytest.mark.parametrize("alphabet", [2, 4, 11])
def test_rings_find_what_brute_force_finds_as_they_grow_by_ragged_pieces(alphabet: int) -> None:
    rng = random.Random(alphabet)
    # Large rings, so that few buckets are shared: colliding contexts take up chain links.
    index = SuffixIndex(ORDERS, num_tokens=2**17, num_rings=3)
    texts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    hits = 0
    for step in range(60):
        pieces = {ring: [rng.randrange(alphabet) for _ in range((step * (ring + 3)) % 7)] for ring in texts}
        pieces[1] += [NO_TOKEN] * (step % 5 == 0)
        grow(index, texts, pieces)
        hits += check(index, texts, limit=4)
    assert hits > 60
    index.check_integrity()


def test_a_wrapped_ring_finds_only_what_is_still_in_its_window() -> None:
    rng = random.Random(3)
    index = SuffixIndex(ORDERS, num_tokens=100)
    ring, room = index.add_ring(), index.room
    texts: dict[int, list[int]] = {ring: []}
    for _ in range(200):
        grow(index, texts, {ring: [rng.randrange(6) for _ in range(rng.randrange(1, 13))]})
        rings = np.array([ring])
        before = index.before(rings, index.end[rings])
        positions, _ = index.occurrences(rings, before, limit=8)
        for position, length in zip(positions[0], index.match_lengths(rings, before, positions)[0], strict=True):
            if position >= 0:
                assert len(texts[ring]) - room <= position < len(texts[ring])
                assert length == brute_match(texts[ring], position)
        index.check_integrity()


def test_a_cleared_ring_remembers_nothing_and_its_neighbours_keep_theirs() -> None:
    index = SuffixIndex(ORDERS, num_tokens=50)
    first, second = index.add_ring(), index.add_ring()
    texts: dict[int, list[int]] = {first: [], second: []}
    grow(index, texts, {first: [1, 2, 3, 1, 2], second: [1, 2, 3, 1, 2]})
    index.clear(first)
    texts[first] = []
    third = index.add_ring()
    texts[third] = []
    grow(index, texts, {first: [1, 2], third: [1, 2]})
    assert check(index, texts, limit=3) == 1
    index.check_integrity()


def test_rings_keep_what_they_know_when_others_are_added() -> None:
    rng = random.Random(6)
    index = SuffixIndex(ORDERS, num_tokens=2**14)
    texts: dict[int, list[int]] = {}
    hits = 0
    for _ in range(40):
        texts[index.add_ring()] = []
        grow(index, texts, {ring: [rng.randrange(4) for _ in range(rng.randrange(6))] for ring in texts})
        hits += check(index, texts, limit=4)
        index.check_integrity()
    assert hits > 40


def test_a_ring_that_wrapped_is_as_new_after_clearing() -> None:
    rng = random.Random(7)
    index = SuffixIndex(ORDERS, num_tokens=20)
    ring = index.add_ring()
    for num_tokens in (30, index.size - 2, index.size, 3 * index.size):
        for _ in range(num_tokens):
            grow(index, {ring: []}, {ring: [rng.randrange(2)]})
        index.clear(ring)
        assert not index.arrays.tokens.any()
        assert not index.arrays.newest.any()
        assert check(index, {ring: []}, limit=4) == 0


def brute_choice(
    continuations: list[list[int]], matches: list[int], limit: int, *, factor: float, offset: float, floor: float
) -> tuple[list[int], list[float]]:
    """The draft by the definition in ``choose``, one candidate and token at a time."""
    best: tuple[float, list[int], list[float]] = (0.0, [], [])
    for tokens, m in zip(continuations, matches, strict=True):
        if m == 0:
            continue
        survival, score, draft, chances = 1.0, 0.0, list[int](), list[float]()
        for k in range(min(limit, int(factor * m + offset), len(tokens))):
            if tokens[k] == NO_TOKEN:
                break
            rivals = [c for c in continuations if c[:k] == tokens[:k] and c[k] != NO_TOKEN]
            agree = sum(c[k] == tokens[k] for c in rivals)
            chance = (agree + (m + k) / (m + k + 1)) / (len(rivals) + 1)
            survival *= chance
            if survival < floor:
                break
            score += survival
            draft.append(tokens[k])
            chances.append(chance)
        if score > best[0] + 1e-12:
            best = (score, draft, chances)
    return best[1], best[2]


def test_the_choice_equals_counting_by_hand() -> None:
    rng = random.Random(8)
    for trial in range(300):
        length, count = rng.randrange(1, 9), rng.randrange(1, 6)
        shared = [rng.randrange(3) for _ in range(length)]
        continuations = []
        for _ in range(count):
            tokens = [t if rng.random() < 0.85 else rng.randrange(3) for t in shared]
            end = rng.randrange(length + 1) if rng.random() < 0.3 else length
            continuations.append(tokens[:end] + [NO_TOKEN] * (length - end))
        matches = [rng.randrange(1, 6) for _ in range(count)] + [0]
        continuations.append([NO_TOKEN] * length)
        limit, factor, floor = rng.randrange(1, 10), rng.choice([0.5, 1.0, 2.0]), rng.choice([0.0, 0.1, 0.5])
        choice = choose(
            np.array([continuations]),
            np.array([matches]),
            max_tokens=np.array([limit]),
            length_factor=factor,
            length_offset=0.5,
            min_survival=floor,
        )
        tokens, chances = brute_choice(continuations, matches, limit, factor=factor, offset=0.5, floor=floor)
        n = int(choice.num_tokens[0])
        assert choice.token_ids[0, :n].tolist() == tokens, trial
        assert choice.confidence[0, :n].tolist() == pytest.approx(chances)
