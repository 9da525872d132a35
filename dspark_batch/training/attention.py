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
    """Blocks of row number ``span`` that see its first ``num_tokens`` tokens. mask: [slots, tokens + slots] to add."""

    span: int
    num_tokens: int
    mask: Tensor

    @property
    def num_slots(self) -> int:
        return self.mask.shape[0]


class PackedAttention:
    """An ``Attend`` of ``drafters.dspark.backbone`` that can be differentiated.

    spans: rows of the batch. anchors: [A] increasing positions within each span, on the host. k, v: [L, C, Hkv, D] of
    the flat context.
    """

    def __init__(self, spans: Sequence[ContextSpan], anchors: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> None:
        # Split once: the gradient of a split is one copy, that of many slices as many zeroed tensors of full size.
        sizes = [span.num_tokens for span in spans]
        self._k, self._v = ([torch.split(layer, sizes) for layer in x.unbind(0)] for x in (k, v))
        self._parts = [part for i, span in enumerate(spans) for part in _parts(i, span, anchors, block_size, like=k)]
        self._num_slots = [part.num_slots for part in self._parts]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [A * B, Hq, D]; k, v: [A * B, Hkv, D]; all rotated. -> [A * B, Hq * D]."""
        num_copies = q.shape[1] // k.shape[1]
        pieces = zip(self._parts, *(torch.split(x, self._num_slots) for x in (q, k, v)), strict=True)
        out = []
        for part, query, own_k, own_v in pieces:
            keys = torch.cat((self._k[layer][part.span][: part.num_tokens], own_k))
            values = torch.cat((self._v[layer][part.span][: part.num_tokens], own_v))
            if num_copies > 1:
                keys, values = keys.repeat_interleave(num_copies, dim=1), values.repeat_interleave(num_copies, dim=1)
            query, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
            y = functional.scaled_dot_product_attention(query, keys, values, attn_mask=part.mask)
            out.append(y[0].transpose(0, 1).flatten(1))
        return torch.cat(out)


def _parts(index: int, span: ContextSpan, anchors: Tensor, block_size: int, *, like: Tensor) -> Iterator[_Part]:
    at_once = _BLOCKS_AT_ONCE[like.device.type]
    end = span.first_block + span.num_blocks
    for first in range(span.first_block, end, at_once):
        chosen = anchors[first : min(first + at_once, end)]
        num_tokens = int(chosen[-1])
        own = torch.arange(len(chosen)).repeat_interleave(block_size)
        hidden = torch.cat((torch.arange(num_tokens) >= chosen[own][:, None], own != own[:, None]), dim=1)
        mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -math.inf)
        yield _Part(index, num_tokens, mask.to(like.device))
