"""What a verification rule gets and gives. The engine lends it the target's side of a round as ``TargetDraws``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_batch.core import SamplingParams
from dspark_batch.tensors import Verdict


@dataclass(frozen=True, slots=True, eq=False)
class VerifyRow:
    """One row of a round. Its flat positions are the anchor's and then one for each drafted token.

    draft: the verified tokens, already cut to the planned length. draft_probs: [len(draft), V] float32, what each was
    sampled from; None for a one-hot draft. round_index: rounds of this row so far; keys the streams of rejection rules.
    noise_key: the row's key, shared with the drafter. request_id and sample: for keys of further streams.
    """

    sampling: SamplingParams
    noise_key: int
    request_id: str
    sample: int
    round_index: int
    draft: Sequence[int]
    draft_probs: Tensor | None = None


class TargetDraws(Protocol):
    """The target's distribution at the N flat positions of some rows, row after row."""

    def draw(self) -> list[int]:
        """[N] tokens, each by its row's keyed noise at its absolute position; argmax at temperature 0."""
        ...

    def probs(self) -> Tensor:
        """[N, V] float32 after penalties, temperature and cuts; one-hot at temperature 0."""
        ...


class Verifier(Protocol):
    """A rule that decides how much of each row's draft stands, and which token follows it. Stateless."""

    @property
    def name(self) -> str: ...

    @property
    def needs_draft_probs(self) -> bool:
        """Whether a sampled draft must come with the distributions that it was sampled from."""
        ...

    def verify(self, rows: Sequence[VerifyRow], target: TargetDraws) -> Verdict: ...
