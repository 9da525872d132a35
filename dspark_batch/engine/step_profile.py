"""Times steps of the loaded target before the first row, to seed the cost of the automatic schedule."""

from __future__ import annotations

from time import perf_counter

import torch

from dspark_batch.models.runner import TargetRunner
from dspark_batch.scheduling.cost import StepCost
from dspark_batch.scheduling.profiler import profile_steps
from dspark_batch.tensors import ForwardBatch, RowSlice, Target

_ROWS = 32


def measured_step_cost(target: Target, *, max_step_tokens: int) -> StepCost:
    """The cost by flat tokens as measured now; unseeded where the target is not a loaded model. Leaves no KV behind."""
    if not isinstance(target, TargetRunner):
        return StepCost()
    return StepCost(profile_steps(lambda count: _time_step(target, count, max_step_tokens=max_step_tokens)))


@torch.inference_mode()
def _time_step(target: TargetRunner, num_tokens: int, *, max_step_tokens: int) -> float | None:
    """Seconds of a forward, its logits and the choice of tokens; None where the step or its KV does not fit."""
    if num_tokens > max_step_tokens:
        return None
    num_rows = min(num_tokens, _ROWS)
    per_row = num_tokens // num_rows
    slots: list[int] = []
    try:
        while len(slots) < num_rows:
            slot = target.kv.allocate(per_row)
            if slot is None:
                return None
            slots.append(slot)
        batch = ForwardBatch(
            token_ids=torch.zeros(num_rows * per_row, dtype=torch.int64, device=target.device),
            slices=tuple(RowSlice(slot, 0, per_row) for slot in slots),
            logit_index=torch.arange(num_rows * per_row, device=target.device),
        )
        started = perf_counter()
        target.logits(target.forward(batch).hidden).argmax(-1).tolist()
        return perf_counter() - started
    finally:
        for slot in slots:
            target.kv.free(slot)
