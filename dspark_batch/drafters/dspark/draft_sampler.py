"""Draws draft tokens of one block, slot by slot, for rows whose sampling parameters differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_batch.drafters.base import DraftRow
from dspark_batch.drafters.margins import best_and_margin, top2_margin
from dspark_batch.sampling import noise
from dspark_batch.sampling.probs import limited_support, limits_support, penalise_
from dspark_batch.sampling.sampler import PositionBatch, SampledRow
from dspark_batch.sampling.streams import Stream, stream_uniforms

NUM_CANDIDATES = 256
"""With shared noise, draws over a whole vocabulary look at this many best tokens. Verification accepts only what the
target draws itself, so a winner missed beyond them costs one rejection, and noise for the rest would cost more."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocabulary:
    """Which tokens can be drafted. Columns are indexes into the draft's logits.

    token_ids: [Vd] int64, the target's token of each column, or None where the columns are the whole vocabulary.
    size: V, of the target.
    """

    size: int
    token_ids: Tensor | None = None

    def to_target(self, columns: Tensor) -> Tensor:
        """[...] columns -> [...] token ids."""
        return columns if self.token_ids is None else self.token_ids[columns]

    def columns_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The columns of those tokens that can be drafted; the others are left out."""
        if self.token_ids is None:
            return token_ids
        known = self.token_ids.cpu().numpy()
        return np.flatnonzero(np.isin(known, token_ids))

    def spread(self, probs: Tensor) -> Tensor:
        """[N, Vd] -> [N, V], zero for tokens that cannot be drafted."""
        if self.token_ids is None:
            return probs
        return probs.new_zeros(probs.shape[0], self.size).index_copy_(1, self.token_ids, probs)


class DraftSampler:
    """Draws for R rows, with the target's penalties, temperature and cuts applied to the draft's logits.

    At temperature 0 the best token. Above it, ``shared_noise`` uses the row's own noise at the token's absolute
    position (coupled verification draws with the same, so that close distributions give equal tokens). Without it,
    tokens come from the row's draft stream and the distributions that they were drawn from are kept.

    rounds: per row, a counter that no two rounds of the row share.
    """

    def __init__(
        self,
        rows: Sequence[DraftRow],
        *,
        vocabulary: DraftVocabulary,
        shared_noise: bool,
        rounds: Sequence[int],
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._margins: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._rows, self._vocabulary, self._shared_noise = rows, vocabulary, shared_noise
        self._num_slots, self._device = num_slots, device
        self._keys = self._index([row.noise_key for row in rows])
        self._starts = self._index([len(row.token_ids) for row in rows])
        sampled = [r for r, row in enumerate(rows) if not row.sampling.is_greedy]
        self._limited = [r for r in sampled if limits_support(rows[r].sampling)]
        self._full = [r for r in sampled if not limits_support(rows[r].sampling)]
        self._penalised = [r for r, row in enumerate(rows) if row.sampling.repetition_penalty != 1.0]
        self._seen = {r: np.asarray(rows[r].token_ids, dtype=np.int64) for r in self._penalised}
        self._temperatures = torch.tensor([rows[r].sampling.temperature for r in self._full]).to(device).unsqueeze(-1)
        self._uniforms: Tensor | None = None
        if sampled and not shared_noise:
            self._uniforms = stream_uniforms(
                Stream.DRAFT, keys=self._keys, rounds=self._index(rounds), num_slots=num_slots
            )
            # The penalty has already been applied, for the draft's own columns.
            self._unpenalised = [
                SampledRow(replace(row.sampling, repetition_penalty=1.0), row.noise_key, 0, ()) for row in rows
            ]
        self._kept: list[Tensor] = []

    def draw(self, logits: Tensor, slot: int) -> Tensor:
        """Target token ids [R] of one slot. Takes ``logits`` [R, Vd] float32 over. Slots come in order."""
        self._penalise(logits)
        best, margin = best_and_margin(logits)
        self._margins.append(margin)
        self._finite.append(logits.gather(1, best.unsqueeze(-1)).squeeze(-1).isfinite())
        if self._uniforms is not None:
            columns = self._draw_kept(logits, self._uniforms[:, slot])
        else:
            columns = self._draw_shared(logits, slot, best)
        token_ids = self._vocabulary.to_target(columns)
        if self._penalised:
            drawn = token_ids.tolist()
            for r in self._penalised:
                self._seen[r] = np.append(self._seen[r], drawn[r])
        return token_ids

    def probs(self, num_tokens: Sequence[int]) -> list[Tensor | None] | None:
        """Per row [num_tokens[r], V] float32, what its first tokens were drawn from; None for greedy rows.

        None altogether where no row was drawn from a kept distribution.
        """
        if not self._kept:
            return None
        kept = torch.stack(self._kept, dim=1)
        return [
            None if row.sampling.is_greedy else self._vocabulary.spread(kept[r, : num_tokens[r]])
            for r, row in enumerate(self._rows)
        ]

    def num_finite(self) -> list[int]:
        """Per row, the slots before the first whose logits allow no draw (NaN, +inf, or nothing above -inf)."""
        found: list[int] = torch.stack(self._finite, dim=1).int().cumprod(1).sum(1).tolist()
        return found

    def margins(self) -> list[list[float]]:
        """Per row, the lead of every slot's best score, as ``DraftBlock.margin`` says.

        Without shared noise it is the lead of the logits, whatever was drawn: it must not depend on the slot's token.
        """
        out: list[list[float]] = torch.stack(self._margins, dim=1).tolist()
        return out

    def _draw_shared(self, logits: Tensor, slot: int, drawn: Tensor) -> Tensor:
        """drawn: [R] columns of the best logits; those of sampled rows are replaced."""
        if self._full:
            index = self._index(self._full)
            best = logits[index].topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1)
            noisy = best.values.double() / self._temperatures + self._noise(index, slot, best.indices)
            drawn[index] = best.indices.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
            self._note_margins(noisy, index)
        if self._limited:
            index = self._index(self._limited)
            support = limited_support(logits[index], [self._rows[r].sampling for r in self._limited])
            noisy = support.scores + self._noise(index, slot, support.token_ids)
            drawn[index] = support.token_ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
            self._note_margins(noisy, index)
        return drawn

    def _note_margins(self, scores: Tensor, index: Tensor) -> None:
        """Replace the slot's margins of some rows by those of their noisy scores [n, C]."""
        self._margins[-1][index] = top2_margin(scores)

    def _noise(self, index: Tensor, slot: int, columns: Tensor) -> Tensor:
        """The noise that verification adds to the same tokens at the same positions."""
        token_ids = self._vocabulary.to_target(columns)
        return noise.gumbel(self._keys[index], self._starts[index] + slot, token_ids)

    def _draw_kept(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """By inversion of the kept distribution itself, so that q is exactly what was sampled from."""
        probs = PositionBatch(logits, self._unpenalised).probs()
        self._kept.append(probs)
        cumulative = probs.double().cumsum(-1)
        total = cumulative[:, -1:]
        at = (uniforms.unsqueeze(-1) * total).minimum(total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp_(max=probs.shape[1] - 1)

    def _penalise(self, logits: Tensor) -> None:
        if self._penalised:
            columns = [self._vocabulary.columns_of(self._seen[r]) for r in self._penalised]
            factors = [self._rows[r].sampling.repetition_penalty for r in self._penalised]
            penalise_(logits, self._penalised, columns, factors)

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)
