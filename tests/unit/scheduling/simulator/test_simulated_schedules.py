"""Schedules on a simulated H100 with an 8B target: what published curves show must show here, as directions."""

from __future__ import annotations

from functools import cache

import pytest

from dspark_batch.errors import ConfigError
from dspark_batch.scheduling.cost_table import CostTable, DraftSample, StepSample
from dspark_batch.scheduling.simulator.acceptance import ParametricAcceptance
from dspark_batch.scheduling.simulator.device import ProfiledDevice, RooflineDevice
from dspark_batch.scheduling.simulator.scenario import (
    Scenario,
    ScenarioResult,
    profiled,
    run_scenario,
    schedule_of,
)

CHANCES = (0.82, 0.80, 0.78, 0.76, 0.74, 0.72, 0.70)
SCHEDULES = ("plain", "fixed-3", "fixed-7", "auto")


@cache
def at(
    concurrency: int, *, prompt_len: int = 128, output_len: int = 128, num_rows: int | None = None
) -> ScenarioResult:
    scenario = Scenario(
        name="test",
        prompt_len=prompt_len,
        mean_output_len=output_len,
        max_new_tokens=2 * output_len,
        concurrency=concurrency,
        num_rows=num_rows,
    )
    return run_scenario(scenario, SCHEDULES, device=RooflineDevice, acceptance=lambda: ParametricAcceptance(CHANCES))


def test_a_full_batch_of_short_rows_loses_by_a_fixed_seven_and_auto_does_not() -> None:
    """Published, 256 rows: fixed 7 at -12 % and -53 % of plain decoding, adaptive ahead of it."""
    found = at(256, num_rows=512)
    assert found.ratio("fixed-7", to="plain") < 0.95
    assert found.ratio("auto", to="plain") > 0.98


def test_few_rows_gain_from_long_drafts_and_auto_takes_the_gain() -> None:
    """Published, one row: 1.8 to 2.7 times plain decoding."""
    found = at(2, num_rows=30)
    assert found.ratio("fixed-7", to="plain") > 1.8
    # Auto begins with a look at what drafting would save; in a job of a few seconds that shows.
    assert found.ratio("auto", to=found.best_fixed) > 0.75


def test_long_contexts_gain_at_the_largest_batch_that_fits() -> None:
    found = at(256, prompt_len=8192, output_len=256, num_rows=60)
    assert found.runs["plain"].mean_rows < 64
    assert found.ratio("fixed-7", to="plain") > 1.15
    assert found.ratio("auto", to="plain") > 1.15


def test_the_tail_gains_even_where_the_full_batch_does_not() -> None:
    plain, auto = (at(256, num_rows=512).runs[name] for name in ("plain", "auto"))
    assert auto.tail_s < 0.85 * plain.tail_s


def test_the_gain_of_a_fixed_length_falls_with_the_rows() -> None:
    gains = [
        found.ratio("fixed-7", to="plain") for found in (at(2, num_rows=30), at(64, num_rows=80), at(256, num_rows=512))
    ]
    assert gains == sorted(gains, reverse=True)


def test_the_profile_of_a_device_is_its_own_cost() -> None:
    steps = StepSample(0, 1, 1, 0.010), StepSample(0, 1, 64, 0.020)
    device = ProfiledDevice(CostTable(steps, (DraftSample(1, 1, 0.0011), DraftSample(64, 1, 0.0074))))
    table = profiled(device, num_draft_tokens=5, max_concurrency=8)
    for step in table.steps:
        assert step.seconds == pytest.approx(0.010 + (step.num_tokens - 1) * 0.010 / 63)
    assert all(draft.seconds == pytest.approx(0.001 + 0.0001 * draft.num_rows) for draft in table.drafts)


@pytest.mark.parametrize("name", ["fixed", "fixed-0", "fixed-x", "best"])
def test_unknown_schedules_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--schedules"):
        schedule_of(name, device=RooflineDevice(), num_draft_tokens=7, max_concurrency=4)


def test_the_same_seed_gives_the_same_rows() -> None:
    scenario = Scenario(name="x", prompt_len=3, mean_output_len=20, max_new_tokens=50, concurrency=4)
    device = RooflineDevice()
    assert scenario.rows(device, seed=1) == scenario.rows(device, seed=1) != scenario.rows(device, seed=2)
    assert all(1 <= row.output_len <= 50 for row in scenario.rows(device))


def test_a_job_has_three_times_the_rows_that_fit_together() -> None:
    def count(concurrency: int, prompt_len: int) -> int:
        scenario = Scenario(
            name="x", prompt_len=prompt_len, mean_output_len=20, max_new_tokens=100, concurrency=concurrency
        )
        return len(scenario.rows(ProfiledDevice(CostTable((StepSample(0, 1, 1, 1.0),)), num_kv_tokens=20_000)))

    assert [count(1, 100), count(30, 100), count(500, 100), count(500, 1900)] == [24, 90, 300, 30]
