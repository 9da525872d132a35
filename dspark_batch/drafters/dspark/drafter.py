"""The DSpark drafter as the engine sees it: rows come and go, features arrive, blocks are drafted in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.drafters.dspark.checkpoint import DrafterWeights, load_checkpoint
from dspark_batch.drafters.dspark.context_cache import ContextCache, RowContext
from dspark_batch.drafters.dspark.draft_sampler import DraftSampler
from dspark_batch.drafters.dspark.model import DSparkModel
from dspark_batch.drafters.dspark.target_parts import TargetParts
from dspark_batch.tensors import DraftBlock

_LOGIT_ELEMENTS = 2**25
"""Draft logits held at a time, in float32 elements; more rows than that draft one part after the other."""

_PENDING_LIMIT_BYTES = 256 * 2**20
_CUDA_SHARE_OF_FREE = 0.5
_SPARE = 1.25
"""Context positions for each of the target's KV pool: every row also needs room for a block, and holds a prefix that
it shares in the target's pool as a copy."""


class DSparkDrafter:
    """Fulfils ``drafters.base.Drafter`` with a DSpark or DFlash checkpoint.

    Features wait until their row drafts again, and are then projected for all rows in one pass; rows that skipped
    rounds catch up that way. A row for which there is no context memory drafts nothing.

    shared_noise: draw with the target's own noise (coupled verification). Otherwise draw from the drafter's stream and
    hand out the draft distributions, which token and block verification need.
    num_context_tokens: the context memory of all rows, in positions; None: a little more than the target's KV pool has,
    on a GPU at most half of the memory that is free.
    """

    name = "dspark"

    def __init__(
        self,
        weights: DrafterWeights,
        parts: TargetParts,
        *,
        shared_noise: bool = True,
        num_context_tokens: int | None = None,
        pending_limit_bytes: int = _PENDING_LIMIT_BYTES,
        where: str = "the drafter",
    ) -> None:
        config = weights.config
        self.config = config
        self._parts = parts
        self._shared_noise = shared_noise
        self.model = DSparkModel(weights, parts, where=where)
        if num_context_tokens is None:
            num_context_tokens = _affordable_tokens(weights, parts)
        self.cache = ContextCache(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_tokens=num_context_tokens,
            dtype=parts.dtype,
            device=parts.device,
            pending_limit_bytes=pending_limit_bytes,
        )
        scales = config.confidence_temperatures or (1.0,) * config.num_draft_tokens
        self._temperatures = torch.tensor(scales, device=parts.device)
        self._num_rounds: dict[int, int] = {}

    @classmethod
    def load(cls, path: str | Path, parts: TargetParts, *, shared_noise: bool) -> DSparkDrafter:
        """The drafter in the folder ``path``.

        Raises:
            ModelError: the checkpoint is unreadable or does not fit the target; every mismatch is named.
            UnsupportedModelError: the drafter has a feature that is not computed.
        """
        folder = Path(path).expanduser()
        return cls(load_checkpoint(folder, parts), parts, shared_noise=shared_noise, where=str(folder))

    @property
    def max_draft_tokens(self) -> int:
        return self.config.num_draft_tokens

    @property
    def expected_survival(self) -> tuple[float, ...]:
        return self.config.expected_survival

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.taps

    def add(self, row: DraftRow) -> None:
        assert row.handle not in self._num_rounds, f"row {row.handle} was added twice"
        self._num_rounds[row.handle] = 0
        total = min(row.prompt_len + row.sampling.max_new_tokens, self._parts.max_context)
        self.cache.add(row.handle, total + self.config.block_size)

    @torch.inference_mode()
    def propose(self, rows: Sequence[DraftRow], max_tokens: Sequence[int]) -> DraftBlock:
        """Draft a full block for every row that may draft at all, and hand out what was asked for of it."""
        chosen: list[int] = []
        contexts: list[RowContext] = []
        for r, (row, limit) in enumerate(zip(rows, max_tokens, strict=True)):
            context = self.cache.get(row.handle) if limit > 0 else None
            if context is not None:
                assert context.num_known == len(row.token_ids) - 1, "invariant 5: context ends just before the anchor"
                chosen.append(r)
                contexts.append(context)
        out = _Collector(len(rows), has_confidence=self.config.has_confidence)
        if not chosen:
            return out.block()
        self.model.extend(self.cache, contexts)
        anchors = [rows[r].token_ids[-1] for r in chosen]
        hidden = self.model.hidden(self.cache, contexts, anchors)
        per_row = self.config.num_draft_tokens * self.config.draft_vocab_size
        at_once = max(1, _LOGIT_ELEMENTS // per_row)
        for first in range(0, len(chosen), at_once):
            part = chosen[first : first + at_once]
            lengths = [min(max_tokens[r], self.config.num_draft_tokens) for r in part]
            self._draft_part([rows[r] for r in part], hidden[first : first + at_once], part, lengths, out)
        return out.block()

    @torch.inference_mode()
    def observe(self, committed: Sequence[Committed], features: Tensor) -> None:
        """Keep the features; they are projected when their row next drafts, or when too many wait."""
        places: list[tuple[RowContext, int, int]] = []
        for row, start, num_tokens, offset in committed:
            context = self.cache.get(row.handle)
            if context is not None:
                known = context.num_known
                assert start == known, f"features from position {start} on, {known} are known"
                places.append((context, offset, num_tokens))
        self.cache.append(features, places)
        if self.cache.is_overfull:
            self.model.extend(self.cache, list(self.cache.rows()))

    def remove(self, row: DraftRow, *, finished: bool) -> None:
        del self._num_rounds[row.handle]
        self.cache.remove(row.handle)

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        assert self.cache.num_rows <= len(self._num_rounds), "context memory is held for a row that has left"

    def _draft_part(
        self, rows: Sequence[DraftRow], hidden: Tensor, index: Sequence[int], lengths: Sequence[int], out: _Collector
    ) -> None:
        rounds = [self._num_rounds[row.handle] for row in rows]
        for row in rows:
            self._num_rounds[row.handle] += 1
        sampler = DraftSampler(
            rows,
            vocabulary=self.model.vocabulary,
            shared_noise=self._shared_noise,
            rounds=rounds,
            num_slots=self.config.num_draft_tokens,
            device=self._parts.device,
        )
        anchors = torch.tensor([row.token_ids[-1] for row in rows]).to(self._parts.device)
        drafted = self.model.draft(hidden, anchors, sampler.draw)
        lengths = [min(pair) for pair in zip(lengths, sampler.num_finite(), strict=True)]
        confidence = drafted.confidence_logits
        out.add(
            index,
            lengths,
            drafted.token_ids.tolist(),
            sampler.probs(lengths),
            None if confidence is None else (confidence / self._temperatures).sigmoid().tolist(),
            sampler.margins(),
        )


class _Collector:
    """Gathers the parts of a round into one ``DraftBlock``; rows without a draft stay empty."""

    def __init__(self, num_rows: int, *, has_confidence: bool) -> None:
        self._token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self._probs: list[Tensor | None] = [None] * num_rows
        self._confidence: list[list[float]] | None = [[] for _ in range(num_rows)] if has_confidence else None
        self._margins: list[list[float]] = [[] for _ in range(num_rows)]
        self._has_probs = False

    def add(
        self,
        index: Sequence[int],
        lengths: Sequence[int],
        token_ids: list[list[int]],
        probs: list[Tensor | None] | None,
        confidence: list[list[float]] | None,
        margins: list[list[float]],
    ) -> None:
        for i, (r, length) in enumerate(zip(index, lengths, strict=True)):
            self._token_ids[r] = token_ids[i][:length]
            if probs is not None:
                self._probs[r] = probs[i] if length else None
                self._has_probs = True
            if self._confidence is not None and confidence is not None:
                self._confidence[r] = confidence[i][:length]
            self._margins[r] = margins[i][:length]

    def block(self) -> DraftBlock:
        return DraftBlock(
            token_ids=self._token_ids,
            probs=self._probs if self._has_probs else None,
            confidence=self._confidence,
            margin=self._margins,
        )


def _affordable_tokens(weights: DrafterWeights, parts: TargetParts) -> int:
    config = weights.config
    wanted = int(parts.num_kv_tokens * _SPARE)
    if parts.device.type != "cuda":
        return wanted
    bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * parts.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(parts.device)
    return min(wanted, int(free * _CUDA_SHARE_OF_FREE) // bytes_per_token)
