"""Whose draft a row gets, what is skipped, and what is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.drafters.hybrid import HybridDrafter
from dspark_batch.drafters.suffix import SuffixConfig, SuffixDrafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.scheduling.policies import FixedLength
from dspark_batch.tensors import DraftBlock
from dspark_batch.testing.plain_decoding import decode_plainly
from dspark_batch.testing.scripted_drafters import RandomDrafter
from dspark_batch.testing.scripted_target import ScriptedModel, ScriptedTarget


class Fixed:
    """Drafts the same tokens for every row, with the same confidence, or none for the rows of ``silent``."""

    taps: tuple[int, ...] = ()
    margin: float | None = None

    def __init__(
        self, name: str, tokens: Sequence[int], *, confidence: float | None, silent: set[int] | None = None
    ) -> None:
        self.name = name
        self.max_draft_tokens = len(tokens)
        self.asked: list[list[int]] = []
        self._tokens = tokens
        self._confidence = confidence
        self._silent = silent or set()

    def add(self, row: DraftRow) -> None: ...

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None: ...

    def remove(self, row: DraftRow, *, finished: bool) -> None: ...

    def check_integrity(self) -> None: ...

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        self.asked.append(list(max_tokens))
        drafts = [
            [] if row.handle in self._silent else list(self._tokens[:limit])
            for row, limit in zip(rows, max_tokens, strict=True)
        ]
        said = None if self._confidence is None else [[self._confidence] * len(d) for d in drafts]
        margins = None if self.margin is None else [[self.margin] * len(d) for d in drafts]
        return DraftBlock(token_ids=drafts, confidence=said, margin=margins)


def row(handle: int) -> DraftRow:
    return DraftRow(handle, 0, SamplingParams(max_new_tokens=50), [1, 2, 3], 3)


def commit(r: DraftRow, tokens: Sequence[int]) -> None:
    assert isinstance(r.token_ids, list)
    r.token_ids.extend(tokens)


def hybrid(lookup: Fixed, model: Fixed, rows: Sequence[DraftRow]) -> HybridDrafter:
    drafter = HybridDrafter(lookup, model)
    for r in rows:
        drafter.add(r)
    return drafter


def test_rows_with_a_strong_match_skip_the_model() -> None:
    rows = [row(0), row(1)]
    lookup, model = Fixed("lookup", [7] * 8, confidence=0.97, silent={1}), Fixed("model", [9] * 4, confidence=0.6)
    block = hybrid(lookup, model, rows).propose(rows, [8, 8])
    assert block.token_ids == [[7] * 8, [9] * 4]
    assert model.asked == [[0, 8]]
    assert block.confidence == [[0.97] * 8, [0.6] * 4]


def test_the_model_is_not_run_at_all_where_every_row_has_a_match() -> None:
    rows = [row(0), row(1)]
    model = Fixed("model", [9] * 4, confidence=0.6)
    hybrid(Fixed("lookup", [7] * 8, confidence=0.97), model, rows).propose(rows, [8, 8])
    assert model.asked == []


def test_a_weak_match_gives_way_to_the_model_and_serves_where_that_has_nothing() -> None:
    rows = [row(0), row(1)]
    lookup, model = Fixed("lookup", [7] * 8, confidence=0.2), Fixed("model", [9] * 4, confidence=None, silent={1})
    block = hybrid(lookup, model, rows).propose(rows, [8, 8])
    assert block.token_ids == [[9] * 4, [7] * 8]
    assert block.confidence is not None
    assert len(block.confidence[0]) == 4


def test_a_boasting_lookup_loses_its_rows_and_an_honest_model_gains_them() -> None:
    r = row(0)
    lookup, model = Fixed("lookup", [7] * 4, confidence=0.95), Fixed("model", [9] * 4, confidence=None)
    drafter = hybrid(lookup, model, [r])
    chosen = []
    for _ in range(12):
        chosen.append(drafter.propose([r], [4]).token_ids[0][0])
        commit(r, [9, 9, 9, 9, 5])
    assert chosen[0] == 7
    assert chosen[-1] == 9


def test_a_row_on_which_the_model_fails_is_left_to_the_lookup() -> None:
    rows = [row(0), row(1)]
    lookup, model = Fixed("lookup", [7] * 3, confidence=0.6), Fixed("model", [9] * 4, confidence=None)
    drafter = hybrid(lookup, model, rows)
    for _ in range(12):
        block = drafter.propose(rows, [4, 4])
        commit(rows[0], [9, 9, 9, 9, 5])
        commit(rows[1], [7, 7, 7, 5])
    assert block.token_ids == [[9] * 4, [7] * 3]


def test_looked_up_drafts_are_marked_by_margins_that_are_none() -> None:
    rows = [row(0), row(1)]
    drafter = hybrid(Fixed("suffix", [7, 8], confidence=0.9, silent={1}), Fixed("model", [5, 6], confidence=0.5), rows)
    block = drafter.propose(rows, [2, 2])
    assert block.margin is not None
    assert [list(map(math.isnan, margins)) for margins in block.margin] == [[True, True], [True, True]]
    with_margins = Fixed("model", [5, 6], confidence=0.5)
    with_margins.margin = 1.5
    block = hybrid(Fixed("suffix", [7, 8], confidence=0.9, silent={1}), with_margins, rows).propose(rows, [2, 2])
    assert block.margin is not None
    assert list(map(math.isnan, block.margin[0])) == [True, True]
    assert block.margin[1] == [1.5, 1.5]


def test_a_draft_that_was_cut_tells_only_about_what_was_seen() -> None:
    r = row(0)
    drafter = hybrid(Fixed("lookup", [7], confidence=0.01), Fixed("model", [9] * 4, confidence=None), [r])
    before = drafter._chance(r)
    drafter.propose([r], [4])
    commit(r, [9])
    drafter._judge(r)
    assert drafter._chance(r) > before


def test_it_learns_from_finished_rows_where_its_lookup_does() -> None:
    model = RandomDrafter(vocab_size=16, max_draft_tokens=3)
    assert HybridDrafter(SuffixDrafter(), model).learns_from_finished
    assert not HybridDrafter(Fixed("lookup", [1], confidence=0.5), model).learns_from_finished


def test_token_ids_do_not_depend_on_it() -> None:
    sampling = SamplingParams(max_new_tokens=29, ignore_eos=True)
    requests = [Request(id=str(i), prompt_token_ids=(i, 1, i), sampling=sampling) for i in range(7)]

    def model() -> ScriptedModel:
        return ScriptedModel(target=ScriptedTarget(vocab_size=16, max_context=64, contrast=6.0))

    drafter = HybridDrafter(
        SuffixDrafter(SuffixConfig(max_draft_tokens=6, orders=(1, 2, 4))),
        RandomDrafter(vocab_size=16, max_draft_tokens=3, taps=(1,)),
    )
    config = EngineConfig(max_concurrency=3, poison_dead_kv=True)
    with BatchEngine(model(), config, drafter=drafter, policy=FixedLength(5)) as engine:
        results = list(engine.generate(requests))
        engine.check_integrity()
    assert [r.token_ids for r in results] == [decode_plainly(model(), request)[0] for request in requests]
