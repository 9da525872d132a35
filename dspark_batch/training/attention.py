"""Attention of packed blocks: each block sees its own row before its anchor, and itself. Nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.training.packing import ContextSpan

_BLOCKS_AT_ONCE = {"cpu": 32, "cuda": 256}
"""Blocks of one row that attend together; each computes, and masks, the slots of the others."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Blocks of one row. slots, context: their places in the flat batch. mask: [slots, context + slots] to add."""

    slots: slice
    context: slice
    mask: Tensor


class PackedAttention:
    """An ``Attend`` of ``drafters.dspark.backbone`` that can be differentiated.

    spans: rows of the batch. anchors: [A] increasing positions within each span, on the host. k, v: [L, C, Hkv, D] of
    the flat context.
    """

    def __init__(self, spans: Sequence[ContextSpan], anchors: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> None:
        self._k, self._v = k, v
        self._parts = [part for span in spans for part in _parts(span, anchors, block_size, like=k)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [A * B, Hq, D]; k, v: [A * B, Hkv, D]; all rotated. -> [A * B, Hq * D]."""
        return torch.cat([self._attend(layer, part, q, k, v) for part in self._parts])

    def _attend(self, layer: int, part: _Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (
            torch.cat((context[layer, part.context], own[part.slots])) for context, own in ((self._k, k), (self._v, v))
        )
        num_groups = q.shape[1] // k.shape[1]
        if num_groups > 1:
            keys, values = keys.repeat_interleave(num_groups, dim=1), values.repeat_interleave(num_groups, dim=1)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q[part.slots], keys, values))
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=part.mask)
        return y[0].transpose(0, 1).flatten(1)


def _parts(span: ContextSpan, anchors: Tensor, block_size: int, *, like: Tensor) -> Iterator[_Part]:
    at_once = _BLOCKS_AT_ONCE[like.device.type]
    end = span.first_block + span.num_blocks
    for first in range(span.first_block, end, at_once):
        chosen = anchors[first : min(first + at_once, end)]
        num_tokens = int(chosen[-1])
        own = torch.arange(len(chosen)).repeat_interleave(block_size)
        hidden = torch.cat((torch.arange(num_tokens) >= chosen[own][:, None], own != own[:, None]), dim=1)
        mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -math.inf)
        slots = slice(first * block_size, (first + len(chosen)) * block_size)
        yield _Part(slots, slice(span.first_token, span.first_token + num_tokens), mask.to(like.device))
