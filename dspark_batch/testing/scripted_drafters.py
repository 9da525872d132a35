"""Drafters with known behaviour: always wrong in odd ways, always right, or watching what the engine tells them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.tensors import DraftBlock


class ScriptedDrafter:
    """Base: checks the engine's side of the protocol (calls in order, committed lengths, features of accepted tokens).

    The features must be those of ``ScriptedTarget``: position and token of every committed position, each once.
    """

    name = "scripted"

    def __init__(self, *, max_draft_tokens: int, taps: tuple[int, ...] = ()) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.taps = taps
        self.num_finished = 0
        self._committed: dict[int, int] = {}

    def add(self, row: DraftRow) -> None:
        assert row.handle not in self._committed, "a row is added once"
        self._committed[row.handle] = 0

    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        for row in rows:
            if self.taps:
                assert self._committed[row.handle] == len(row.token_ids) - 1, "invariant 5: same committed length"
        drafts = [self.draft(row, limit) for row, limit in zip(rows, max_tokens, strict=True)]
        return DraftBlock(token_ids=drafts)

    def draft(self, row: DraftRow, limit: int) -> list[int]:
        raise NotImplementedError

    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        assert self.taps, "a drafter without taps is told nothing"
        for one in committed:
            row = one.row
            assert one.start == self._committed[row.handle], "features arrive in order, without gaps"
            seen = features[one.offset : one.offset + one.num_tokens, :2].tolist()
            assert len(seen) == one.num_tokens, "every committed token has its features"
            for position, (at, token) in enumerate(seen, start=one.start):
                assert at == position, "a token's position is its index in its row"
                assert token == row.token_ids[position], "features of accepted tokens only"
            self._committed[row.handle] = one.start + one.num_tokens

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        del self._committed[row.handle]
        self.num_finished += finished

    def check_integrity(self) -> None:
        assert all(length >= 0 for length in self._committed.values())


class RandomDrafter(ScriptedDrafter):
    """Drafts of random length and content; with a small vocabulary some of it is right by chance."""

    name = "random"

    def __init__(self, *, vocab_size: int, max_draft_tokens: int, seed: int = 0, taps: tuple[int, ...] = ()) -> None:
        super().__init__(max_draft_tokens=max_draft_tokens, taps=taps)
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def draft(self, row: DraftRow, limit: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(self._random.randint(0, limit))]


class OracleDrafter(ScriptedDrafter):
    """Knows every row's whole text by its noise key, and errs with probability ``error_rate`` per token."""

    name = "oracle"

    def __init__(
        self,
        texts: Mapping[int, Sequence[int]],
        *,
        max_draft_tokens: int,
        error_rate: float = 0.0,
        seed: int = 0,
        taps: tuple[int, ...] = (),
    ) -> None:
        super().__init__(max_draft_tokens=max_draft_tokens, taps=taps)
        self._texts = texts
        self._error_rate = error_rate
        self._random = random.Random(seed)

    def draft(self, row: DraftRow, limit: int) -> list[int]:
        known = self._texts[row.noise_key][len(row.token_ids) :][:limit]
        padded = [*known, *[0] * (limit - len(known))]
        return [0 if self._random.random() < self._error_rate else token for token in padded]
