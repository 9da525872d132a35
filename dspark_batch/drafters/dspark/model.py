"""The whole drafter as one computation: from anchors and context to drafted tokens of ragged rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_batch.drafters.dspark.backbone import Backbone, ContextLayers
from dspark_batch.drafters.dspark.block_attention import BlockAttention
from dspark_batch.drafters.dspark.checkpoint import HEAD, DrafterWeights
from dspark_batch.drafters.dspark.confidence_head import confidence_head
from dspark_batch.drafters.dspark.context_cache import ContextCache, RowContext, SpanWriter
from dspark_batch.drafters.dspark.draft_sampler import DraftVocabulary
from dspark_batch.drafters.dspark.markov_head import markov_head
from dspark_batch.drafters.dspark.target_parts import LinearOp, RunBlocks, TargetParts, head_rows
from dspark_batch.tensors import BlockWeights

DrawSlot = Callable[[Tensor, int], Tensor]
"""(logits [R, Vd] float32, slot) -> target token ids [R]; may overwrite the logits."""

_MAX_TOKENS_AT_ONCE = 8192
"""Context positions projected together; bounds the activations of a long catch-up."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """token_ids: [R, γ] int64. confidence_logits: [R, γ] float32, before the sigmoid; None without the head."""

    token_ids: Tensor
    confidence_logits: Tensor | None


class DSparkModel:
    """Backbone, heads and the target's shared parts. Holds no state of rows."""

    def __init__(self, weights: DrafterWeights, parts: TargetParts, *, where: str) -> None:
        config = weights.config
        self.config = config
        self._parts = parts
        self.vocabulary = DraftVocabulary(config.vocab_size, weights.token_ids)
        self._markov = markov_head(config, weights.tensors, linear=parts.linear)
        self._confidence = confidence_head(config, weights.tensors)
        self._own_head = self._reduced_head(weights)
        # A block that starts at the last position of the context ends this far behind it.
        num_positions = parts.max_context + config.block_size
        self._cos, self._sin = parts.rope_table(
            config.rope, head_dim=config.head_dim, num_positions=num_positions, where=where
        )
        self._blocks = self._block_layers(weights)
        self._backbone: Backbone | None = None
        if self._blocks is None:
            self._backbone = Backbone(config, weights.tensors, linear=parts.linear, ops=parts.ops)
        self._context = self._backbone or ContextLayers(config, weights.tensors, linear=parts.linear, ops=parts.ops)

    def extend(self, cache: ContextCache, rows: Sequence[RowContext]) -> None:
        """Project the waiting features of all rows in one pass and keep the keys and values."""
        behind = [row for row in rows if row.num_pending]
        if not behind:
            return
        writer = SpanWriter([(row.start + row.length, row.num_pending) for row in behind], self._parts.device)
        positions = [p for row in behind for p in range(row.length, row.num_known)]
        index = torch.tensor(positions).to(self._parts.device)
        features = cache.take_pending(behind).to(self._parts.dtype)
        for first in range(0, features.shape[0], _MAX_TOKENS_AT_ONCE):
            part = slice(first, first + _MAX_TOKENS_AT_ONCE)
            at = index[part]
            k, v = self._context.context(features[part], self._cos[at], self._sin[at])
            writer.write(cache.k, k.transpose(1, 2), at=first)
            writer.write(cache.v, v.transpose(1, 2), at=first)

    def hidden(self, cache: ContextCache, rows: Sequence[RowContext], anchors: Sequence[int]) -> Tensor:
        """[R, γ, H]: the backbone's output at the slots that predict a token.

        Each row's context ends just before its anchor, so ``row.length`` is the anchor's position.
        """
        config, size = self.config, self.config.block_size
        device = self._parts.device
        token_ids = torch.full((len(rows), size), config.mask_token_id, device=device)
        token_ids[:, 0] = torch.tensor(anchors).to(device)
        x = self._parts.embed(token_ids.flatten())
        if self._blocks is not None:
            places = [(row.start, row.length) for row in rows]
            out = self._blocks(x, places, size=size, first=config.first_slot, k=cache.k, v=cache.v)
            return out.view(len(rows), size - config.first_slot, -1)
        assert self._backbone is not None
        lengths = torch.tensor([row.length for row in rows]).to(device)
        positions = (lengths[:, None] + torch.arange(size, device=device)).flatten()
        out = self._backbone.blocks(x, self._cos[positions], self._sin[positions], BlockAttention(config, cache, rows))
        return out.view(len(rows), size, -1)[:, config.first_slot :]

    def draft(self, hidden: Tensor, anchors: Tensor, draw: DrawSlot) -> Drafted:
        """Left to right over the slots, all rows at once. hidden: [R, γ, H]; anchors: [R] int64."""
        num_rows, num_slots, _ = hidden.shape
        base = self.logits(hidden.flatten(0, 1)).view(num_rows, num_slots, -1)
        previous, state = anchors, None
        drafted, embedded = [], []
        for slot in range(num_slots):
            logits = base[:, slot]
            if self._markov is not None:
                embedding = self._markov.embed(previous)
                bias, state = self._markov.bias(embedding, hidden[:, slot], state)
                logits = logits + bias.float()
                embedded.append(embedding)
            previous = draw(logits, slot)
            drafted.append(previous)
        confidence = None
        if self._confidence is not None:
            confidence = self._confidence.logits(hidden, torch.stack(embedded, dim=1) if embedded else None)
        return Drafted(torch.stack(drafted, dim=1), confidence)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, Vd] float32, without the sequential head's bias."""
        return self._parts.logits(hidden) if self._own_head is None else self._own_head(hidden).float()

    def _block_layers(self, weights: DrafterWeights) -> RunBlocks | None:
        """All layers in one call, where the device can and no layer has a window."""
        config = self.config
        if any(window is not None for window in config.layer_windows):
            return None
        return self._parts.block_layers(
            BlockWeights(
                tensors=weights.tensors,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                norm_eps=config.norm_eps,
                cos=self._cos,
                sin=self._sin,
            )
        )

    def _reduced_head(self, weights: DrafterWeights) -> LinearOp | None:
        if weights.token_ids is None:
            return None
        own = weights.tensors.get(HEAD)
        return self._parts.linear(head_rows(self._parts, weights.token_ids) if own is None else own, float32=True)
