"""From a pilot to the whole job: the price of the last rows, intervals that cover, and what they know."""

from __future__ import annotations

import random

import pytest

from dspark_batch.batch.pilot import TimedStep
from dspark_batch.job.forecast import Interval, Pilot, Speed, estimate_of, failed_fraction, row_seconds

ROUND_S = 0.002


def step(seconds: float, *, running: int, prompts: int = 0, queue: bool = False) -> TimedStep:
    return TimedStep(
        seconds=seconds, num_running=running, num_rounds=running, num_prompt_tokens=prompts, has_queue=queue
    )


def pilot(generated: list[int], *, num_input_rows: int, num_drawn: int | None = None, steps=None) -> Pilot:
    """Rows of 10 prompt tokens that took a round a token, and as long."""
    num_rounds = sum(generated)
    return Pilot(
        num_input_rows=num_input_rows,
        num_drawn=num_drawn or len(generated),
        num_passing=len(generated),
        prompt_tokens=[10] * len(generated),
        generated_tokens=generated,
        num_rounds=generated,
        steps=[step(ROUND_S * num_rounds, running=num_rounds)] if steps is None else steps,
    )


def covers(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def test_the_last_rows_are_priced_as_in_a_full_batch_and_the_rest_is_the_end_of_the_job() -> None:
    steps = [step(0.5, running=4, prompts=90, queue=True)] + [step(0.1, running=4)] * 6
    steps += [step(0.1, running=running) for running in (3, 2, 1)]
    speed = Speed.of(steps)
    assert (speed.num_together, speed.had_queue) == (4, True)
    assert speed.round_s == pytest.approx(0.1 / 4)
    assert speed.full_s == pytest.approx(0.5 + 0.6 + 6 * 0.1 / 4)
    assert speed.end_s == pytest.approx(0.3 - 6 * 0.1 / 4)


def test_steps_of_a_batch_that_memory_keeps_small_are_full_while_others_wait() -> None:
    speed = Speed.of([step(0.1, running=8), *[step(0.1, running=4, queue=True)] * 9, step(0.1, running=2)])
    assert speed.round_s == pytest.approx(10 * 0.1 / (8 + 9 * 4))


def test_prompts_and_rounds_are_paid_by_the_rows_that_have_them() -> None:
    steps = [step(3.0, running=2, prompts=300), *[step(0.1, running=2)] * 10]
    rows = Pilot(
        num_input_rows=2,
        num_drawn=2,
        num_passing=2,
        prompt_tokens=[100, 200],
        generated_tokens=[12, 12],
        num_rounds=[11, 11],
        steps=steps,
    )
    rounds_s = 22 * 0.05
    prompts_s = 4.0 - rounds_s
    expected = [prompts_s / 3 + rounds_s / 2, 2 * prompts_s / 3 + rounds_s / 2]
    assert row_seconds(rows, Speed.of(steps)) == pytest.approx(expected)


def test_without_a_step_that_only_decodes_time_goes_by_prompts() -> None:
    rows = pilot([1, 1], num_input_rows=2, steps=[step(2.0, running=2, prompts=20), step(1.0, running=1, prompts=9)])
    speed = Speed.of(rows.steps)
    assert (speed.full_s, speed.end_s, speed.round_s) == (3.0, 0.0, None)
    assert row_seconds(rows, speed) == [1.5, 1.5]


@pytest.mark.parametrize("num_rows", [48, 128])
def test_intervals_cover_the_truth_nine_times_in_ten(num_rows: int) -> None:
    chance = random.Random(num_rows)
    table = [min(256, 1 + int(chance.expovariate(1 / 60))) for _ in range(20_000)]
    found = [
        estimate_of(pilot(chance.sample(table, num_rows), num_input_rows=20_000), num_engines=1, load_s=0.0)
        for _ in range(200)
    ]
    tokens = sum(covers(estimate.generated_tokens, sum(table)) for estimate in found)
    times = sum(covers(estimate.time_s, ROUND_S * sum(table)) for estimate in found)
    assert 165 <= tokens <= 195
    assert 165 <= times <= 195


def test_the_share_that_a_filter_lets_pass_is_estimated_with_its_own_interval() -> None:
    chance = random.Random(5)
    num_covered = 0
    for _ in range(200):
        num_passing = sum(chance.random() < 0.2 for _ in range(240)) or 1
        rows = estimate_of(pilot([10] * num_passing, num_input_rows=50_000, num_drawn=240), num_engines=1, load_s=0.0)
        num_covered += covers(rows.rows, 10_000)
        assert rows.generated_tokens.low == pytest.approx(10 * rows.rows.low)
    assert 165 <= num_covered <= 195


def test_nothing_is_uncertain_about_rows_that_were_all_seen() -> None:
    steps = [*[step(0.1, running=3)] * 5, step(0.1, running=1)]
    whole = estimate_of(pilot([5, 5, 6], num_input_rows=9, num_drawn=9, steps=steps), num_engines=1, load_s=3.0)
    assert whole.rows == Interval(3.0, 3.0, 3.0)
    assert whole.generated_tokens == Interval(16.0, 16.0, 16.0)
    assert whole.failed_fraction == Interval(0.0, 0.0, 0.0)
    assert whole.time_s.value == whole.time_s.low == whole.time_s.high == pytest.approx(0.6)


def test_engines_share_the_rows_and_each_has_an_end_of_its_own() -> None:
    steps = [*[step(0.1, running=2)] * 10, step(0.1, running=1)]
    one, four = (
        estimate_of(pilot([10, 11], num_input_rows=1000, steps=steps), num_engines=engines, load_s=0.0)
        for engines in (1, 4)
    )
    end_s = 0.1 - 0.05
    assert one.time_s.value == pytest.approx(1.05 / 2 * 1000 + end_s)
    assert four.time_s.value == pytest.approx(1.05 / 2 * 250 + end_s)
    assert four.engine_hours.value == pytest.approx(4 * four.time_s.value / 3600)
    assert one.tokens_per_s == pytest.approx(21 / 1.05)
    assert one.rows_per_s == pytest.approx(2 / 1.05)


def test_a_pilot_without_failed_rows_does_not_promise_that_there_are_none() -> None:
    none = failed_fraction(0, 48, num_all_rows=1e9)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1.645**2 / (48 + 1.645**2))
    assert failed_fraction(48, 48, num_all_rows=1e9).high == 1.0


def test_rows_that_all_failed_before_the_engine_take_no_time() -> None:
    rows = pilot([0, 0], num_input_rows=100, steps=[])
    estimate = estimate_of(rows, num_engines=1, load_s=0.0)
    assert (estimate.time_s.value, estimate.tokens_per_s) == (0.0, 0.0)
