"""Jobs for the simulator, and every schedule over each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.scheduling.auto import AutoLength
from dspark_batch.scheduling.cost import DraftCost, StepCost
from dspark_batch.scheduling.cost_table import CostTable
from dspark_batch.scheduling.policies import FixedLength, LengthPolicy, ThresholdLength
from dspark_batch.scheduling.profiler import Grid, measure_costs
from dspark_batch.scheduling.simulator.acceptance import AcceptanceModel
from dspark_batch.scheduling.simulator.device import Device, StepWork
from dspark_batch.scheduling.simulator.loop import SimulatedEngine, SimulatedRow, SimulatedRun

PLAIN = "plain"
AUTO = "auto"
THRESHOLD = "threshold"
_FIXED = "fixed-"
_FEWEST_ROWS = 24
_LENGTH_SHAPE = 3.0
_SHORTEST_OUTPUT = 8
_PROFILED_CONTEXT = 128
_LONGEST_CONTEXT = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A job in tokens. num_rows: None: three times as many as the device can hold together, and at least 24.

    ends_at_limits: each row's limit is its own output length, as with ``ignore_eos``; else outputs end by themselves,
    at ``max_new_tokens`` at the latest.
    """

    name: str
    prompt_len: int
    mean_output_len: int
    max_new_tokens: int
    concurrency: int
    num_rows: int | None = None
    ends_at_limits: bool = False

    def rows(self, device: Device, *, seed: int = 0) -> list[SimulatedRow]:
        """Rows in order of arrival; output lengths vary about the mean and end at the limit."""
        together = min(self.concurrency, device.num_kv_tokens // (self.prompt_len + self.max_new_tokens))
        count = self.num_rows or max(_FEWEST_ROWS, 3 * together)
        random = np.random.default_rng(seed)
        drawn = random.gamma(_LENGTH_SHAPE, self.mean_output_len / _LENGTH_SHAPE, count)
        lengths = np.clip(drawn, _SHORTEST_OUTPUT, self.max_new_tokens).astype(int).tolist()
        limits = lengths if self.ends_at_limits else [self.max_new_tokens] * count
        return [SimulatedRow(self.prompt_len, *of_row) for of_row in zip(lengths, limits, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """runs: by schedule, in the order asked for."""

    scenario: Scenario
    runs: dict[str, SimulatedRun]

    def ratio(self, schedule: str, *, to: str) -> float:
        """Tokens per second of one schedule over another's."""
        return self.runs[schedule].tokens_per_s / self.runs[to].tokens_per_s

    def __add__(self, other: ScenarioResult) -> ScenarioResult:
        """The same scenario once more, with other rows."""
        runs = {name: run + other.runs[name] for name, run in self.runs.items()}
        return ScenarioResult(scenario=self.scenario, runs=runs)

    @property
    def best_fixed(self) -> str:
        """The best schedule that does not adapt, plain decoding included."""
        return max(filter(is_fixed, self.runs), key=lambda name: self.runs[name].tokens_per_s)


def is_fixed(schedule: str) -> bool:
    """Whether it does not adapt: plain decoding, or a fixed length."""
    return schedule == PLAIN or schedule.startswith(_FIXED)


def run_scenario(
    scenario: Scenario,
    schedules: Sequence[str],
    *,
    device: Callable[[], Device],
    acceptance: Callable[[], AcceptanceModel],
    max_step_tokens: int = 8192,
    seed: int = 0,
    counts_planning: bool = False,
) -> ScenarioResult:
    """Every schedule over the same rows, on a fresh device and with a fresh acceptance model.

    Raises:
        ConfigError: an unknown schedule.
    """
    rows = scenario.rows(device(), seed=seed)
    runs = {}
    for name in schedules:
        model, clock = acceptance(), device()
        policy = schedule_of(
            name, device=clock, num_draft_tokens=model.num_positions, max_concurrency=scenario.concurrency
        )
        engine = SimulatedEngine(
            rows,
            device=clock,
            policy=policy,
            acceptance=model,
            max_concurrency=scenario.concurrency,
            max_step_tokens=max_step_tokens,
            counts_planning=counts_planning,
        )
        runs[name] = engine.run()
    return ScenarioResult(scenario=scenario, runs=runs)


def schedule_of(name: str, *, device: Device, num_draft_tokens: int, max_concurrency: int) -> LengthPolicy:
    """``plain``, ``fixed-K``, ``threshold`` or ``auto``; the last profiles the device first, as an engine does.

    Raises:
        ConfigError: an unknown name.
    """
    if name == PLAIN:
        return FixedLength(0)
    if name == AUTO:
        table = profiled(device, num_draft_tokens=num_draft_tokens, max_concurrency=max_concurrency)
        return AutoLength(
            max_draft_tokens=num_draft_tokens,
            cost=StepCost(table),
            draft_cost=DraftCost(table.drafts),
            learns_from_finished=False,
        )
    if name == THRESHOLD:
        return ThresholdLength(num_draft_tokens)
    length = name.removeprefix(_FIXED)
    if name.startswith(_FIXED) and length.isdecimal() and int(length):
        return FixedLength(min(int(length), num_draft_tokens))
    raise ConfigError([Problem("--schedules", f"must be plain, auto, threshold or fixed-K, got {name!r}")])


def profiled(device: Device, *, num_draft_tokens: int, max_concurrency: int) -> CostTable:
    """The cost table that the profiler makes of a simulated device."""

    def time_step(context_tokens: int, num_rows: int, num_tokens: int) -> float | None:
        work = StepWork(
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_logits=num_tokens,
            num_context_tokens=num_rows * context_tokens,
        )
        return device.step_s(work) if work.num_context_tokens <= device.num_kv_tokens else None

    def time_draft(num_rows: int, num_tokens: int) -> float | None:
        return device.draft_s(num_rows=num_rows, longest=num_tokens, num_context_tokens=num_rows * _PROFILED_CONTEXT)

    grid = Grid.for_engine(
        most_rows=max_concurrency,
        longest_draft=num_draft_tokens,
        max_context=min(_LONGEST_CONTEXT, device.num_kv_tokens),
        draft_lengths=(num_draft_tokens,),
    )
    table = measure_costs(grid, time_step=time_step, time_draft=time_draft)
    assert table is not None, "one row fits every device"
    return table
