from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.ngram import NgramDrafter


def draft_row(token_ids: list[int], handle: int = 0) -> DraftRow:
    return DraftRow(handle=handle, noise_key=0, sampling=SamplingParams(), token_ids=token_ids, prompt_len=1)


def brute_force(tokens: Sequence[int], limit: int, *, max_ngram: int, min_ngram: int) -> list[int]:
    for size in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if list(tokens[end - size : end]) == list(tokens[len(tokens) - size :]):
                grown = list(tokens)
                for offset in range(limit):
                    grown.append(grown[end + offset])
                return grown[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=6),
    limit=st.integers(1, 9),
    sizes=st.sampled_from([(4, 2), (3, 1), (2, 2), (5, 3)]),
)
@settings(max_examples=200, deadline=None)
def test_drafts_equal_a_brute_force_search_while_the_row_grows(
    tokens: list[int], cuts: list[int], limit: int, sizes: tuple[int, int]
) -> None:
    max_ngram, min_ngram = sizes
    drafter = NgramDrafter(max_draft_tokens=9, max_ngram=max_ngram, min_ngram=min_ngram)
    live = tokens[:1]
    row = draft_row(live)
    drafter.add(row)
    for cut in [*sorted(cuts), len(tokens)]:
        live.extend(tokens[len(live) : cut])
        drafter.check_integrity()
        (draft,) = drafter.propose([row], [limit]).token_ids
        assert list(draft) == brute_force(live, limit, max_ngram=max_ngram, min_ngram=min_ngram)


def test_a_short_period_is_drafted_to_full_length() -> None:
    drafter = NgramDrafter(max_draft_tokens=7)
    row = draft_row([9, 1, 2, 3, 1, 2, 3])
    drafter.add(row)
    assert list(drafter.propose([row], [7]).token_ids[0]) == [1, 2, 3, 1, 2, 3, 1]


def test_rows_do_not_see_each_other_and_a_limit_of_zero_drafts_nothing() -> None:
    drafter = NgramDrafter(max_draft_tokens=4)
    first, second = draft_row([1, 2, 3, 1, 2], 0), draft_row([7, 8, 1, 2], 1)
    drafter.add(first)
    drafter.add(second)
    assert list(map(list, drafter.propose([first, second], [2, 2]).token_ids)) == [[3, 1], []]
    assert list(map(list, drafter.propose([second, first], [2, 0]).token_ids)) == [[], []]
    drafter.remove(first, finished=True)
    drafter.add(first)


def test_senseless_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="min_ngram=3, max_ngram=2"):
        NgramDrafter(max_ngram=2, min_ngram=3)
