"""Draws, probabilities and log-probabilities at flat positions whose rows have parameters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_batch.core import SamplingParams, TokenLogprobs
from dspark_batch.sampling import noise
from dspark_batch.sampling.probs import LimitedSupport, limited_support, limits_support, penalise_
from dspark_batch.tensors import FastDraws


@dataclass(frozen=True, slots=True, eq=False)
class SampledRow:
    """One row's run of flat positions: position j predicts the row's token ``start + j``, given ``draft[:j]``.

    seen: [S] int64, the row's committed tokens (doubles allowed); needed only with a repetition penalty. masks:
    [len(draft) + 1, W] bits by token id, set for what a constraint allows; None: everything.
    """

    sampling: SamplingParams
    noise_key: int
    start: int
    draft: Sequence[int]
    seen: NDArray[np.int64] | None = None
    masks: NDArray[np.int32] | None = None


class GreedyDraws:
    """Tokens of N flat positions that are all greedy, drawn without logits: what ``FastDraws.greedy`` gave."""

    def __init__(self, token_ids: Tensor, finite: Tensor) -> None:
        self._token_ids: list[int] = token_ids.tolist()
        self._finite: list[bool] = finite.tolist()

    def finite(self) -> list[bool]:
        return self._finite

    def draw(self) -> list[int]:
        return self._token_ids

    def probs(self) -> Tensor:
        raise AssertionError("greedy positions are verified without distributions")


class PositionBatch:
    """Target logits of N flat positions of R rows, row after row, each with len(row.draft) + 1 of them.

    Takes ``logits`` [N, V] float32 over: penalties and constraints are applied in place. ``fast``: kernels that draw
    the same tokens.
    """

    def __init__(self, logits: Tensor, rows: Sequence[SampledRow], *, fast: FastDraws | None = None) -> None:
        self.logits = logits
        self.rows = rows
        self._fast = fast
        self._row_of = [r for r, row in enumerate(rows) for _ in range(len(row.draft) + 1)]
        assert len(self._row_of) == logits.shape[0], "one row of logits for each position"
        self._penalise()
        self._constrain()
        self._best = logits.argmax(-1) if fast is None else fast.argmax(logits)[0]
        best_logit = logits.gather(1, self._best.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        self._finite: list[bool] = (best_logit.isfinite() & (self._best >= 0)).tolist()

    def finite(self) -> list[bool]:
        """Per position, whether a draw is possible: no NaN, no +inf, and at least one token above -inf."""
        return self._finite

    def draw(self) -> list[int]:
        """The token of every position, by its row's noise at its absolute position; greedy at temperature 0."""
        drawn = self._best
        full, limited = self._split()
        if full or limited:
            keys, starts = self._noise_coordinates()
            drawn = drawn.clone()
            if self._fast is not None:
                undecided = self._draw_fast(self._fast, drawn, sorted((*full, *limited)), keys, starts)
                full = [i for i in full if i in undecided]
                limited = [i for i in limited if i in undecided]
            if full:
                index, scores = self._tempered(full)
                best = self._best[index]
                drawn[index] = noise.argmax_with_noise(scores, keys[index], starts[index], best=best)
            if limited:
                index = self._index(limited)
                support = self._support(limited)
                noisy = support.scores + noise.gumbel(keys[index], starts[index], support.token_ids)
                drawn[index] = support.token_ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
        tokens: list[int] = drawn.clamp(min=0).tolist()
        return tokens

    def _draw_fast(self, fast: FastDraws, drawn: Tensor, flat: list[int], keys: Tensor, starts: Tensor) -> set[int]:
        """Fills ``drawn`` at the given positions; those that the kernels leave to the slow path."""
        flat = [i for i in flat if self._finite[i]]
        index = self._index(flat)
        sampling = [self.rows[self._row_of[i]].sampling for i in flat]
        top_k = self._index([s.top_k or 0 for s in sampling])
        integers = torch.stack((top_k, keys[index], starts[index], self._best[index]), dim=1)
        reals = torch.tensor([(s.temperature, s.top_p, s.min_p or 0.0) for s in sampling], dtype=torch.float64)
        tokens = fast.draw(self.logits, flat=index, integers=integers, reals=reals.view(-1, 3))
        drawn[index] = torch.where(tokens < 0, drawn[index], tokens)
        return set(index[tokens < 0].tolist())

    def probs(self) -> Tensor:
        """[N, V] float32, the distribution that every position is sampled from; one-hot where temperature is 0."""
        out = torch.zeros_like(self.logits)
        out.scatter_(1, self._best.clamp(min=0).unsqueeze(-1), 1.0)
        full, limited = self._split()
        if full:
            index, scores = self._tempered(full)
            out[index] = scores.double().softmax(-1).float()
        if limited:
            index = self._index(limited)
            support = self._support(limited)
            dense = torch.zeros(len(limited), self.logits.shape[1], device=self.logits.device)
            # Padding of the support repeats token 0 with probability 0, so the entries are added, not stored.
            out[index] = dense.scatter_add_(1, support.token_ids, support.scores.softmax(-1).float())
        return out

    def logprobs(self, positions: Sequence[int], token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities (after penalties and constraints, temperature 1) of emitted tokens, by flat position."""
        logprobs = self.logits[self._index(positions)].log_softmax(-1)
        chosen = logprobs.gather(1, self._index(token_ids).unsqueeze(-1)).squeeze(-1).tolist()
        top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
        return [
            TokenLogprobs(token_id, logprob, tuple(ids), tuple(values))
            for token_id, logprob, ids, values in zip(
                token_ids, chosen, top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]

    def _penalise(self) -> None:
        positions: list[int] = []
        seen: list[NDArray[np.int64]] = []
        penalties: list[float] = []
        flat = 0
        for row in self.rows:
            penalty = row.sampling.repetition_penalty
            if penalty != 1.0:
                assert row.seen is not None, "a repetition penalty needs the row's tokens"
                for j in range(len(row.draft) + 1):
                    positions.append(flat + j)
                    seen.append(np.concatenate((row.seen, np.asarray(row.draft[:j], dtype=np.int64))))
                    penalties.append(penalty)
            flat += len(row.draft) + 1
        if positions:
            penalise_(self.logits, positions, seen, penalties)

    def _constrain(self) -> None:
        flat = 0
        for row in self.rows:
            count = len(row.draft) + 1
            if row.masks is not None:
                bits = np.unpackbits(row.masks.view(np.uint8), axis=1, count=self.logits.shape[1], bitorder="little")
                forbidden = torch.from_numpy(bits == 0).to(self.logits.device)
                self.logits[flat : flat + count].masked_fill_(forbidden, -torch.inf)
            flat += count

    def _split(self) -> tuple[list[int], list[int]]:
        """Flat positions drawn over the whole vocabulary, and over a limited support; the rest is greedy."""
        full: list[int] = []
        limited: list[int] = []
        flat = 0
        for row in self.rows:
            count = len(row.draft) + 1
            if not row.sampling.is_greedy:
                (limited if limits_support(row.sampling) else full).extend(range(flat, flat + count))
            flat += count
        return full, limited

    def _noise_coordinates(self) -> tuple[Tensor, Tensor]:
        """Keys and absolute positions, [N] int64 each."""
        keys = [row.noise_key for row in self.rows for _ in range(len(row.draft) + 1)]
        starts = [row.start + j for row in self.rows for j in range(len(row.draft) + 1)]
        return self._index(keys), self._index(starts)

    def _tempered(self, flat: list[int]) -> tuple[Tensor, Tensor]:
        index = self._index(flat)
        temperature = torch.tensor([self.rows[self._row_of[i]].sampling.temperature for i in flat])
        return index, self.logits[index].div_(temperature.to(self.logits.device).unsqueeze(-1))

    def _support(self, flat: list[int]) -> LimitedSupport:
        logits = self.logits if len(flat) == self.logits.shape[0] else self.logits[self._index(flat)]
        return limited_support(logits, [self.rows[self._row_of[i]].sampling for i in flat])

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.logits.device)
