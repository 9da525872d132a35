"""AdamW with warm-up and decay, over named parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dspark_batch.training.config import OptimizeSection


def learning_rate(step: int, config: OptimizeSection) -> float:
    """Of step 0 .. num_steps-1: linear warm-up, then a decay to ``final_fraction`` of the highest."""
    warmup = round(config.warmup_fraction * config.num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.num_steps - warmup)
    if config.decay == "late":
        progress = max(0.0, 1 - (config.num_steps - step) / (config.late_fraction * config.num_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * falling)


def make_optimizer(parameters: Mapping[str, Tensor], config: OptimizeSection) -> torch.optim.AdamW:
    """Norms and biases are not decayed."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
