"""Attention of packed blocks: each block sees its own row before its anchor, and itself. Nothing else, by
construction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_batch.training.packing import ContextSpan


class PackedAttention:
    """An ``Attend`` of ``drafters.dspark.backbone`` that can be differentiated.

    spans: rows of the batch. anchors: [A] positions on the device. k, v: [L, C, Hkv, D] of the flat context.
    """

    def __init__(self, spans: Sequence[ContextSpan], anchors: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> None:
        self._spans, self._k, self._v, self._size = spans, k, v, block_size
        # True where a block must not look: [blocks, 1, tokens] per span.
        self._hidden = [
            torch.arange(span.num_tokens, device=k.device) >= anchors[span.first_block :][: span.num_blocks, None, None]
            for span in spans
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [A * B, Hq, D]; k, v: [A * B, Hkv, D]; all rotated. -> [A * B, Hq * D]."""
        out = [self._span(layer, i, q, k, v) for i in range(len(self._spans))]
        return torch.cat(out)

    def _span(self, layer: int, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        span, size = self._spans[index], self._size
        slots = slice(span.first_block * size, (span.first_block + span.num_blocks) * size)
        tokens = slice(span.first_token, span.first_token + span.num_tokens)
        num_kv_heads, head_dim = k.shape[1:]
        # [Hkv, G, blocks, B, D]: the heads of a group and all slots are rows of one product with the row's keys.
        queries = q[slots].view(span.num_blocks, size, num_kv_heads, -1, head_dim).permute(2, 3, 0, 1, 4)
        queries = queries / math.sqrt(head_dim)
        own_k, own_v = (x[slots].view(span.num_blocks, size, num_kv_heads, head_dim) for x in (k, v))
        own_k, own_v = own_k.permute(2, 0, 3, 1).unsqueeze(1), own_v.permute(2, 0, 1, 3).unsqueeze(1)
        keys, values = self._k[layer, tokens].permute(1, 2, 0), self._v[layer, tokens].transpose(0, 1)
        flat = queries.reshape(num_kv_heads, -1, head_dim)
        shape = queries.shape[:-1]
        seen = (flat @ keys).view(*shape, span.num_tokens).masked_fill(self._hidden[index], -math.inf)
        scores = torch.cat((seen, queries @ own_k), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        context, block = torch.split(weights, [span.num_tokens, size], dim=-1)
        y = (context.reshape(num_kv_heads, -1, span.num_tokens) @ values).view(*shape, head_dim) + block @ own_v
        flat_out: Tensor = y.permute(2, 3, 0, 1, 4).reshape(span.num_blocks * size, -1)
        return flat_out
