from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.suffix import SuffixConfig, SuffixDrafter

Output = Callable[[random.Random], list[int]]
EOS = 0


def make_row(handle: int, prompt: list[int], output: list[int] | None = None) -> DraftRow:
    return DraftRow(handle, handle, SamplingParams(), [*prompt, *(output or [])], len(prompt))


def json_label(rng: random.Random) -> list[int]:
    """An object of four fixed keys, 7 tokens each, and values of few kinds: 34 tokens, 4 of them values."""
    values = [rng.choices(range(100, 104), weights=[8, 4, 2, 1])[0], 110 + (rng.random() < 0.1), 120 + rng.randrange(3)]
    out: list[int] = []
    for field, value in enumerate([*values, 130]):
        out += [*range(7 * field + 1, 7 * field + 8), value]
    return [*out, 30, EOS]


def simulate(drafter: SuffixDrafter, output: Output, *, num_rows: int, concurrency: int) -> tuple[float, list[int]]:
    """Decode scripted outputs row by row; gives emitted tokens per round and the rounds of each row."""
    rng = random.Random(0)
    active: dict[int, tuple[DraftRow, list[int]]] = {}
    started = 0
    rounds: dict[int, int] = {}
    emitted = 0
    while started < num_rows or active:
        while len(active) < concurrency and started < num_rows:
            prompt = [rng.randrange(2000, 9000) for _ in range(37)] + list(range(1000, 1012))
            row = make_row(started, prompt)
            drafter.add(row)
            active[started] = (row, output(rng))
            started += 1
        block = drafter.propose([row for row, _ in active.values()], [16] * len(active))
        assert block.confidence is not None
        for (row, text), tokens, chances in zip(list(active.values()), block.token_ids, block.confidence, strict=True):
            assert len(tokens) == len(chances) <= 16
            assert all(0 < chance < 1 for chance in chances)
            done = len(row.token_ids) - row.prompt_len
            accepted = 0
            while accepted < len(tokens) and text[done + accepted] == tokens[accepted] != EOS:
                accepted += 1
            row.token_ids.extend(text[done : done + accepted + 1])  # type: ignore[attr-defined]
            rounds[row.handle] = rounds.get(row.handle, 0) + 1
            emitted += accepted + 1
            if row.token_ids[-1] == EOS:
                drafter.remove(row, finished=True)
                del active[row.handle]
    drafter.check_integrity()
    return emitted / sum(rounds.values()), list(rounds.values())


def test_labelling_outputs_are_accepted_four_tokens_a_round_and_more() -> None:
    accepted_len, _ = simulate(SuffixDrafter(), json_label, num_rows=200, concurrency=8)
    assert accepted_len >= 4


def test_rows_learn_from_finished_rows_and_from_nothing_without_the_global_part() -> None:
    _, rounds = simulate(SuffixDrafter(), json_label, num_rows=60, concurrency=2)
    assert sum(rounds[-10:]) < 0.35 * sum(rounds[:2]) * 5
    alone, _ = simulate(SuffixDrafter(SuffixConfig(global_tokens=0)), json_label, num_rows=20, concurrency=2)
    assert alone < 1.2


def test_the_first_token_of_a_row_is_drafted_from_the_end_of_its_prompt() -> None:
    drafter = SuffixDrafter()
    template = [70, 71, 72, 73]
    first = make_row(0, [5, 6, 7, *template], [1, 2, 3, EOS])
    drafter.add(first)
    drafter.remove(first, finished=True)
    second = make_row(1, [8, 9, *template])
    drafter.add(second)
    assert drafter.propose([second], [8]).token_ids == [[1, 2, 3, EOS]]


def test_a_row_that_did_not_finish_teaches_nothing() -> None:
    drafter = SuffixDrafter()
    first = make_row(0, [70, 71, 72], [1, 2, 3])
    drafter.add(first)
    drafter.remove(first, finished=False)
    second = make_row(1, [70, 71, 72])
    drafter.add(second)
    assert drafter.propose([second], [8]).token_ids == [[]]


def test_a_draft_grows_with_the_match_and_keeps_to_what_was_asked() -> None:
    drafter = SuffixDrafter(SuffixConfig(length_factor=1.0, min_survival=0.0))
    text = list(range(100, 160))
    for match in (2, 3, 7, 16):
        row = make_row(match, [*text, 999, *text[10 : 10 + match]])
        drafter.add(row)
        assert drafter.propose([row], [16]).token_ids == [text[10 + match : 10 + 2 * match]]
        assert drafter.propose([row], [2]).token_ids == [text[10 + match : 12 + match]]
        assert drafter.propose([row], [0]).token_ids == [[]]


def test_tokens_whose_estimated_survival_is_low_are_dropped() -> None:
    rng = random.Random(4)
    prompt = [token for _ in range(8) for token in (1, 2, 3, 4, rng.randrange(50, 90), rng.randrange(50, 90))]
    lengths = []
    for floor in (0.0, 0.1, 0.4):
        drafter = SuffixDrafter(SuffixConfig(length_factor=8.0, min_survival=floor))
        row = make_row(0, [*prompt, 1, 2])
        drafter.add(row)
        block = drafter.propose([row], [16])
        assert block.token_ids[0][:2] == [3, 4]
        assert block.confidence is not None
        assert block.confidence[0][0] > 0.9
        lengths.append(len(block.token_ids[0]))
    assert lengths[0] >= lengths[1] >= lengths[2] == 2
    assert lengths[0] == 16


def test_drafts_are_a_function_of_history_not_of_handles_or_company() -> None:
    def run(handles: list[int], *, extra: bool) -> list[list[int]]:
        drafter = SuffixDrafter()
        rng = random.Random(1)
        if extra:
            for handle in (901, 902):
                drafter.add(make_row(handle, [rng.randrange(9) for _ in range(50)]))
        rng = random.Random(2)
        rows = [make_row(handle, [rng.randrange(4) for _ in range(29)]) for handle in handles]
        for row in rows:
            drafter.add(row)
        return [list(ids) for ids in drafter.propose(rows, [16] * len(rows)).token_ids]

    assert run([0, 1, 2], extra=False) == run([17, 5, 44], extra=True)


@pytest.mark.parametrize("global_tokens", [1, 50, 3000])
def test_memory_is_bounded_over_many_rows_and_whole_outputs_are_evicted(global_tokens: int) -> None:
    config = SuffixConfig(global_tokens=global_tokens, local_tokens=64, orders=(2, 4))
    drafter = SuffixDrafter(config)
    rng = random.Random(5)
    sizes = set()
    for handle in range(400):
        row = make_row(handle, [rng.randrange(50) for _ in range(rng.randrange(1, 200))])
        drafter.add(row)
        for _ in range(3):
            drafter.propose([row], [8])
            row.token_ids.extend(rng.randrange(50) for _ in range(11))  # type: ignore[attr-defined]
        drafter.remove(row, finished=True)
        sizes.add(drafter.num_bytes)
        if handle % 40 == 0:
            drafter.check_integrity()
    drafter.check_integrity()
    assert len(sizes) == 1


def test_a_config_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"orders must be positive and increasing, got \(4, 2\)"):
        SuffixConfig(orders=(4, 2))
    with pytest.raises(ValueError, match="max_draft_tokens must lie"):
        SuffixConfig(max_draft_tokens=65)
