"""The drafter's bookkeeping: lengths, memory, laziness, and what rows without memory get."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_batch.core import SamplingParams
from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.drafters.dspark import drafter as drafter_module
from dspark_batch.drafters.dspark.drafter import DSparkDrafter
from dspark_batch.testing.tiny_drafter import PlainParts, random_drafter, tiny_drafter_config

PROMPTS = (3, 17, 8, 1, 29)


def make_drafter(*, config: dict[str, Any] | None = None, parts: PlainParts | None = None, **options: Any) -> Any:
    weights = random_drafter(tiny_drafter_config(**(config or {})))
    return DSparkDrafter(weights, parts or PlainParts.random(), **options)


def make_row(handle: int, prompt_len: int, *, temperature: float = 0.0, max_new_tokens: int = 20) -> DraftRow:
    tokens = torch.randint(0, 61, (prompt_len + 1,), generator=torch.Generator().manual_seed(handle)).tolist()
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    return DraftRow(handle=handle, noise_key=handle, sampling=sampling, token_ids=tokens, prompt_len=prompt_len)


def features_of(row: DraftRow, start: int, end: int) -> Tensor:
    """A function of the row and the positions."""
    return torch.randn(61, 96, generator=torch.Generator().manual_seed(100 + row.handle))[start:end]


def show(drafter: DSparkDrafter, row: DraftRow, start: int, end: int) -> None:
    drafter.observe([Committed(row, start, end - start, 0)], features_of(row, start, end))


def rows_in(drafter: DSparkDrafter, **fields: Any) -> list[DraftRow]:
    rows = [make_row(handle, prompt_len, **fields) for handle, prompt_len in enumerate(PROMPTS)]
    for row in rows:
        drafter.add(row)
        show(drafter, row, 0, row.prompt_len)
    return rows


def test_rows_get_at_most_what_they_asked_for_and_the_same_full_block_behind_it() -> None:
    full, part = make_drafter(), make_drafter()
    whole = full.propose(rows_in(full), [5] * 5)
    cut = part.propose(rows_in(part), [5, 0, 2, 1, 9])
    assert [len(ids) for ids in cut.token_ids] == [5, 0, 2, 1, 5]
    for got, want in zip(cut.token_ids, whole.token_ids, strict=True):
        assert got == want[: len(got)]
    assert whole.probs is None
    assert whole.margin is not None
    assert [len(margins) for margins in cut.margin] == [5, 0, 2, 1, 5]
    for got, want in zip(cut.confidence, whole.confidence, strict=True):
        assert got == pytest.approx(want[: len(got)], abs=1e-5)
    assert all(0 < c < 1 for row in whole.confidence for c in row)


def test_a_drafter_without_confidence_head_gives_margins_alone() -> None:
    drafter = make_drafter(config={"markov": None, "has_confidence": False, "sample_from_anchor": False})
    block = drafter.propose(rows_in(drafter), [9, 9, 2, 9, 9])
    assert block.confidence is None
    assert [len(ids) for ids in block.token_ids] == [4, 4, 2, 4, 4]
    assert [len(margins) for margins in block.margin] == [4, 4, 2, 4, 4]
    assert all(margin >= 0 for margins in block.margin for margin in margins)
    assert drafter.max_draft_tokens == 4


@pytest.mark.parametrize("draft_vocab_size", [61, 23])
def test_without_shared_noise_sampled_rows_come_with_their_distributions(draft_vocab_size: int) -> None:
    drafter = make_drafter(config={"draft_vocab_size": draft_vocab_size}, shared_noise=False)
    sampled = rows_in(drafter, temperature=0.8)
    greedy = make_row(9, 4)
    drafter.add(greedy)
    show(drafter, greedy, 0, 4)
    block = drafter.propose([*sampled, greedy], [5, 3, 0, 1, 5, 4])
    assert block.probs[2] is None
    assert block.probs[5] is None
    for ids, probs in zip(block.token_ids[:2], block.probs[:2], strict=True):
        assert probs.shape == (len(ids), 61)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(ids)))
        assert all(probs[k, token] > 0 for k, token in enumerate(ids))


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_ends_before_the_first_slot_that_is_not_finite(
    shared_noise: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = make_drafter(shared_noise=shared_noise), make_drafter(shared_noise=shared_noise)
    expected = whole.propose(rows_in(whole, temperature=temperature), [5, 5, 2, 5, 5])
    logits_of = broken.model.logits

    def logits(hidden: Tensor) -> Tensor:
        found = logits_of(hidden).view(5, 5, -1)
        found[0, 3] = torch.nan
        found[1, 0, 7] = torch.inf
        found[2, 4] = torch.nan
        found[3, 2] = -torch.inf
        return found.flatten(0, 1)

    monkeypatch.setattr(broken.model, "logits", logits)
    got = broken.propose(rows_in(broken, temperature=temperature), [5, 5, 2, 5, 5])
    lengths = [3, 0, 2, 2, 5]
    for name in ("token_ids", "confidence", "margin"):
        assert getattr(got, name) == [of_row[:n] for of_row, n in zip(getattr(expected, name), lengths, strict=True)]
    assert (got.probs is None) == (expected.probs is None)
    for probs, n in zip(got.probs or (), lengths, strict=False):
        assert (probs is None) == (n == 0 or temperature == 0)
        assert probs is None or (probs.shape[0] == n and probs.isfinite().all())


def test_parts_of_a_round_that_is_too_large_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_drafter(config={"markov": "rnn"}, shared_noise=False)
    expected = whole.propose(rows_in(whole, temperature=1.0), [5, 4, 0, 5, 2])
    monkeypatch.setattr(drafter_module, "_LOGIT_ELEMENTS", 2 * 5 * 61)
    parts = make_drafter(config={"markov": "rnn"}, shared_noise=False)
    got = parts.propose(rows_in(parts, temperature=1.0), [5, 4, 0, 5, 2])
    assert got.token_ids == expected.token_ids
    for mine, theirs in zip(got.probs, expected.probs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_features_are_projected_when_too_many_wait_and_drafts_stay_the_same() -> None:
    lazy, eager = make_drafter(), make_drafter(pending_limit_bytes=0)
    eager_rows, lazy_rows = rows_in(eager), rows_in(lazy)
    assert all(context.num_pending == 0 for context in eager.cache.rows())
    assert sum(context.num_pending for context in lazy.cache.rows()) == sum(PROMPTS)
    assert eager.propose(eager_rows, [5] * 5).token_ids == lazy.propose(lazy_rows, [5] * 5).token_ids
    for drafter in (lazy, eager):
        drafter.check_integrity()


def test_a_row_without_memory_drafts_nothing_and_does_not_disturb_the_others() -> None:
    roomy, tight = make_drafter(), make_drafter(num_context_tokens=100)
    expected = roomy.propose(rows_in(roomy), [5] * 5)
    rows = rows_in(tight)
    block = tight.propose(rows, [5] * 5)
    have = [tight.cache.get(row.handle) is not None for row in rows]
    assert have == [True, True, False, True, False]
    for is_in, got, want in zip(have, block.token_ids, expected.token_ids, strict=True):
        assert got == (want if is_in else [])
    tight.check_integrity()
    tight.remove(rows[1], finished=True)
    late = make_row(7, 10)
    tight.add(late)
    assert tight.cache.get(7) is not None, "the memory of a row that left serves the next"
    for row in (rows[0], *rows[2:], late):
        tight.remove(row, finished=False)
    tight.check_integrity()
    assert tight.cache.num_free_tokens == tight.cache.num_total_tokens


def test_rows_reserve_no_more_than_the_targets_context() -> None:
    drafter = make_drafter(parts=PlainParts.random(max_context=40))
    row = make_row(0, 30, max_new_tokens=1000)
    drafter.add(row)
    assert drafter.cache.num_total_tokens - drafter.cache.num_free_tokens == 40 + 5
    show(drafter, row, 0, 30)
    row.token_ids.extend([1] * 9)  # type: ignore[attr-defined]
    show(drafter, row, 30, 39)
    [ids] = drafter.propose([row], [5]).token_ids
    assert len(ids) == 5


def test_features_out_of_order_are_a_fault() -> None:
    drafter = make_drafter()
    row = make_row(0, 8)
    drafter.add(row)
    show(drafter, row, 0, 4)
    with pytest.raises(AssertionError, match="from position 5 on, 4 are known"):
        show(drafter, row, 5, 8)
    with pytest.raises(AssertionError, match="invariant 5"):
        drafter.propose([row], [5])
