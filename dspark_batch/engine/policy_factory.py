"""From settings to the policy that chooses draft and verify lengths."""

from __future__ import annotations

from dspark_batch.drafters.base import Drafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.step_profile import measured_step_cost
from dspark_batch.scheduling.auto import AutoLength
from dspark_batch.scheduling.policies import FixedLength, LengthPolicy, ThresholdLength
from dspark_batch.tensors import Target


def make_policy(config: EngineConfig, drafter: Drafter, target: Target) -> LengthPolicy:
    """The policy of ``config.schedule``. ``auto`` times a few steps of ``target`` first, a fraction of a second."""
    num_tokens = min(config.max_draft_tokens or drafter.max_draft_tokens, drafter.max_draft_tokens)
    may_use_draft = config.verification == "coupled"
    if config.schedule == "off" or not num_tokens:
        return FixedLength(0)
    if config.schedule == "fixed":
        return FixedLength(num_tokens)
    if config.schedule == "threshold":
        return ThresholdLength(num_tokens, may_use_draft=may_use_draft)
    cost = measured_step_cost(target, max_step_tokens=config.max_step_tokens)
    return AutoLength(max_draft_tokens=num_tokens, cost=cost, may_use_draft=may_use_draft)
