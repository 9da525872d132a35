"""What the automatic schedule itself costs: microseconds per round in its three calls, by rows decoded together.

The rounds are made up: an open gate, a drafter with confidences, known tokens. Plans of up to 64 drafted tokens stand
for most rounds; beyond, every round is planned, which is the dear case.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dspark_batch.tensors import DraftBlock

_CHANCE = 0.8
_WARM_UP_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningCost:
    """Means over rounds, in microseconds. plan_us: draft lengths and verify plan; learn_us: what follows the step.

    step_share: of a step that takes ``step_ms``; None where that is not known.
    """

    num_rows: int
    draft_tokens: int
    is_silent: bool
    plan_us: float
    learn_us: float
    step_ms: float | None = None

    @property
    def total_us(self) -> float:
        return self.plan_us + self.learn_us

    @property
    def step_share(self) -> float | None:
        return None if self.step_ms is None else self.total_us / (1e3 * self.step_ms)


def planning_cost(
    num_rows: int, *, draft_tokens: int = 7, is_silent: bool = False, num_rounds: int = 60, step_ms: float | None = None
) -> PlanningCost:
    """is_silent: the drafter gives no confidences, so that lengths come from the acceptance history."""
    import numpy as np

    from dspark_batch.scheduling.auto import AutoLength
    from dspark_batch.scheduling.cost import StepCost
    from dspark_batch.scheduling.cost_table import CostTable
    from dspark_batch.scheduling.policies import RoundLoad, RoundOutcome

    table = CostTable.from_function(lambda t, r, c: 0.02 + 2e-6 * t, rows=(1, 4, 16, 64, 256, 1024))
    policy = AutoLength(max_draft_tokens=draft_tokens, cost=StepCost(table))
    rng = np.random.default_rng(0)
    handles = list(range(num_rows))
    load = RoundLoad(handles=handles, limits=[100] * num_rows, num_prefill_tokens=0, num_queued=9, context_tokens=300.0)
    plan_s: list[float] = []
    learn_s: list[float] = []
    for _ in range(_WARM_UP_ROUNDS + num_rounds):
        started = perf_counter()
        lengths = policy.draft_lengths(load)
        spent_s = perf_counter() - started
        verified = [0] * num_rows
        if any(lengths):
            block = _block(rng, lengths, is_silent=is_silent)
            started = perf_counter()
            verified = list(policy.verify_plan(load, block).verify_len)
            spent_s += perf_counter() - started
        held = np.minimum(rng.geometric(1 - _CHANCE, num_rows) - 1, verified).tolist()
        emitted = [[1] * (count + 1) for count in held]
        outcome = RoundOutcome(verified, held, num_rows + sum(verified), 0, 0.001, 0.02, emitted)
        started = perf_counter()
        policy.observe(load, outcome)
        learn_s.append(perf_counter() - started)
        plan_s.append(spent_s)
    return PlanningCost(
        num_rows=num_rows,
        draft_tokens=draft_tokens,
        is_silent=is_silent,
        plan_us=1e6 * fmean(plan_s[_WARM_UP_ROUNDS:]),
        learn_us=1e6 * fmean(learn_s[_WARM_UP_ROUNDS:]),
        step_ms=step_ms,
    )


def _block(rng: np.random.Generator, lengths: Sequence[int], *, is_silent: bool) -> DraftBlock:
    from dspark_batch.tensors import DraftBlock

    tokens = [[1] * length for length in lengths]
    confidence = None if is_silent else [rng.uniform(0.5, 0.99, length).tolist() for length in lengths]
    return DraftBlock(token_ids=tokens, confidence=confidence)


def plain_step_ms(target: str, rows: Sequence[int]) -> dict[int, float]:
    """Milliseconds of a plain step of ``target`` from its cost table, measured where there is none."""
    from dspark_batch.bench.cost_profile import measure_profile
    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.scheduling.cost import StepCost

    cost = StepCost(measure_profile(EngineConfig(target=target, drafter="suffix")).table)
    return {n: 1e3 * float(cost.seconds([float(n)], num_rows=n, context_tokens=300.0)[0]) for n in rows}


def format_costs(costs: Sequence[PlanningCost]) -> str:
    lines = ["rows  drafts  drafter   plan µs  learn µs   total µs  step ms  share"]
    for cost in costs:
        step = "" if cost.step_ms is None else f"{cost.step_ms:8.2f} {cost.step_share:6.2%}"
        kind = "silent" if cost.is_silent else "talking"
        lines.append(
            f"{cost.num_rows:4d} {cost.draft_tokens:7d}  {kind:8s} {cost.plan_us:8.0f} {cost.learn_us:9.0f}"
            f" {cost.total_us:10.0f} {step}"
        )
    return "\n".join(lines)


def main() -> None:
    """``python -m dspark_batch.bench.planning_cost [--rows 1,8,64] [--draft-tokens 7] [--target NAME] [--json]``"""
    parser = argparse.ArgumentParser(description="time that the automatic schedule takes per round")
    parser.add_argument("--rows", default="1,8,64,256,1024")
    parser.add_argument("--draft-tokens", type=int, default=7)
    parser.add_argument("--target", help="compare with a plain step of this target")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = [int(part) for part in given.rows.split(",")]
    steps = plain_step_ms(given.target, rows) if given.target else {}
    costs = [
        planning_cost(n, draft_tokens=given.draft_tokens, is_silent=is_silent, step_ms=steps.get(n))
        for n in rows
        for is_silent in (False, True)
    ]
    sys.stdout.write(format_costs(costs) + "\n")
    if given.json:
        sys.stdout.write(json.dumps([{**asdict(c), "step_share": c.step_share} for c in costs]) + "\n")


if __name__ == "__main__":
    main()
