"""Drafts of rows whose text is constrained: what has to come is drafted for nothing, what may not come is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from dspark_batch.engine.state import RowState
from dspark_batch.tensors import DraftBlock

T = TypeVar("T")


def forced_drafts(rows: Sequence[RowState], limits: Sequence[int]) -> list[list[int]]:
    """[R] the next tokens of each row as far as its constraint leaves no choice; empty for the others.

    They hold in every verification mode, as nothing else has a chance.
    """
    pairs = zip(rows, limits, strict=True)
    return [[] if row.matcher is None else row.matcher.forced(limit) for row, limit in pairs]


def with_forced(block: DraftBlock, forced: Sequence[Sequence[int]]) -> DraftBlock:
    """The drafts of a round, with the forced ones in the place of those of their rows."""
    if not any(forced):
        return block
    token_ids = [must or tokens for must, tokens in zip(forced, block.token_ids, strict=True)]
    probs = block.probs and [None if must else p for must, p in zip(forced, block.probs, strict=True)]
    return DraftBlock(token_ids=token_ids, probs=probs)


def within_constraints(rows: Sequence[RowState], block: DraftBlock, *, may_cut_sampled: bool) -> DraftBlock:
    """The drafts, each cut before its first token that its row's constraint forbids.

    A sampled draft under rejection keeps that token (``may_cut_sampled`` is false): it is rejected for certain, and
    what follows has to come from the residual then.
    """
    if all(row.matcher is None for row in rows):
        return block
    lengths = [
        len(tokens)
        if row.matcher is None or not (may_cut_sampled or block.probs is None or block.probs[r] is None)
        else row.matcher.num_allowed(tokens)
        for r, (row, tokens) in enumerate(zip(rows, block.token_ids, strict=True))
    ]
    return replace(
        block,
        token_ids=_cut(block.token_ids, lengths),
        confidence=block.confidence and _cut(block.confidence, lengths),
        margin=block.margin and _cut(block.margin, lengths),
    )


def _cut(values: Sequence[Sequence[T]], lengths: Sequence[int]) -> list[Sequence[T]]:
    return [of_row[:length] for of_row, length in zip(values, lengths, strict=True)]
