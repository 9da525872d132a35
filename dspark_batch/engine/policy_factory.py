"""From settings to the policy that chooses draft and verify lengths."""

from __future__ import annotations

from dspark_batch.drafters.base import Drafter, LearningDrafter, MeasuredDrafter
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.step_profile import cost_table
from dspark_batch.scheduling.auto import AutoLength
from dspark_batch.scheduling.cost import DraftCost, StepCost
from dspark_batch.scheduling.policies import FixedLength, LengthPolicy, ThresholdLength
from dspark_batch.tensors import Target


def make_policy(config: EngineConfig, drafter: Drafter, target: Target, *, target_fingerprint: str) -> LengthPolicy:
    """The policy of ``config.schedule``. ``auto`` takes the cost table of the device, and measures it (seconds) where
    there is none yet."""
    num_tokens = min(config.max_draft_tokens or drafter.max_draft_tokens, drafter.max_draft_tokens)
    if config.schedule == "off" or not num_tokens:
        return FixedLength(0)
    if config.schedule == "fixed":
        return FixedLength(num_tokens)
    if config.schedule == "threshold":
        return ThresholdLength(num_tokens)
    table = cost_table(target, drafter, config, target_fingerprint=target_fingerprint)
    return AutoLength(
        max_draft_tokens=num_tokens,
        cost=StepCost(table) if table is not None else None,
        draft_cost=DraftCost(table.drafts) if table is not None else None,
        may_use_draft=config.verification == "coupled",
        expected_survival=drafter.expected_survival if isinstance(drafter, MeasuredDrafter) else (),
        learns_from_finished=isinstance(drafter, LearningDrafter) and drafter.learns_from_finished,
    )
