"""The slow oracle: one token and one head at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_batch.models.attention.base import (
    AttentionContext,
    QKVWriter,
    RowPlan,
    TokenPlan,
    plan_rows,
    plan_tokens,
)
from dspark_batch.tensors import ForwardBatch


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    rows: list[RowPlan]
    tokens: TokenPlan


class ReferenceAttention:
    """Attention by its definition. Only for tests: its time grows with tokens times heads times context."""

    def __init__(self, context: AttentionContext) -> None:
        self._context = context
        self._write = QKVWriter(context)

    def plan(self, batch: ForwardBatch) -> ReferencePlan:
        rows = plan_rows(batch, self._context.kv)
        return ReferencePlan(rows, plan_tokens(rows, self._context))

    def attend(self, layer: int, qkv: Tensor, plan: ReferencePlan) -> Tensor:
        spec, kv = self._context.spec, self._context.kv
        query = self._write(layer, qkv, plan.tokens)
        out = torch.empty_like(query)
        window = spec.sliding_windows[layer]
        for row in plan.rows:
            for j in range(row.num_tokens):
                seen = row.kv_len + j + 1
                first = 0 if window is None else max(0, seen - window)
                places = row.pool_indices(0)[first:seen]
                for head in range(spec.num_heads):
                    kv_head = head // spec.num_query_groups
                    keys = kv.k[layer, kv_head, places].double()
                    values = kv.v[layer, kv_head, places].double()
                    scores = keys @ query[row.first + j, head].double() / math.sqrt(spec.head_dim)
                    out[row.first + j, head] = (scores.softmax(0) @ values).to(out.dtype)
        return out.flatten(1)
