"""From a pilot of a few rows to what the whole job would take, with intervals. Knows neither engine nor input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dspark_batch.batch.pilot import TimedStep

CONFIDENCE, Z = 0.9, 1.645
"""How often an interval is to hold the true value, and so many standard deviations of a normal distribution do."""
NUM_RESAMPLES = 2000
SEED = 0
FULL_SHARE = 0.9
"""Of the most samples that decoded together: with fewer a batch is not full, unless others wait for a place in it."""


@dataclass(frozen=True, slots=True)
class Interval:
    """What is expected, and the 90 % interval around it."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    """What a pilot showed. By row: tokens of its prompt; tokens and rounds of all its samples.

    Of ``num_drawn`` rows that were drawn from all ``num_input_rows`` (without those that a plan leaves out),
    ``num_passing`` passed the filter. ``num_copied`` rows took the result of an equal prompt. ``steps``: of the engine.
    """

    num_input_rows: int
    num_drawn: int
    num_passing: int
    prompt_tokens: Sequence[int]
    generated_tokens: Sequence[int]
    num_rounds: Sequence[int]
    steps: Sequence[TimedStep]
    num_failed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    num_copied: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a pilot's engine was. num_together: the most samples that decoded together; had_queue: others waited.

    full_s: the time of the pilot, had its last rows run in a full batch, as almost all rows of a long job do, and not
    with ever fewer beside them. end_s: what they took beyond that. round_s: one round of one sample in a full batch, in
    steps without prompts; None where there were none.
    """

    num_together: int
    had_queue: bool
    full_s: float
    end_s: float
    round_s: float | None

    @classmethod
    def of(cls, steps: Sequence[TimedStep]) -> Speed:
        most = max((step.num_running for step in steps), default=0)
        full: list[TimedStep] = []
        end: list[TimedStep] = []
        for step in steps:
            if not step.num_prompt_tokens:
                (full if step.has_queue or step.num_running >= FULL_SHARE * most else end).append(step)
        num_rounds = sum(step.num_rounds for step in full)
        round_s = sum(step.seconds for step in full) / num_rounds if num_rounds else None
        end_s = 0.0
        if round_s is not None:
            end_s = sum(max(0.0, step.seconds - step.num_rounds * round_s) for step in end)
        return cls(
            num_together=most,
            had_queue=any(step.has_queue for step in steps),
            full_s=sum(step.seconds for step in steps) - end_s,
            end_s=end_s,
            round_s=round_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a job would take. ``time_s`` and ``engine_hours`` are without ``load_s``, the time that loading took."""

    num_input_rows: int
    rows: Interval
    """Rows that pass the filter."""
    num_pilot_rows: int
    num_copied: int
    num_together: int
    had_queue: bool
    prompt_tokens_per_row: Interval
    generated_tokens_per_row: Interval
    failed_fraction: Interval
    failures: Mapping[str, int]
    prompt_tokens: Interval
    generated_tokens: Interval
    tokens_per_s: float
    """Generated tokens of one engine with a full batch; the time that prompts take counts."""
    rows_per_s: float
    """The same in rows."""
    load_s: float
    num_engines: int
    time_s: Interval
    engine_hours: Interval


def estimate_of(pilot: Pilot, *, num_engines: int, load_s: float) -> Estimate:
    """What a pilot tells of the whole job.

    Intervals are by resampling the pilot's rows, and the narrower the larger its part of the input is. That of the
    failed rows is Wilson's: none in a pilot does not mean that there are none.
    """
    import numpy as np

    speed = Speed.of(pilot.steps)
    share = pilot.num_passing / pilot.num_drawn
    num_rows = pilot.num_input_rows * share
    chance = np.random.default_rng(SEED)
    shares = chance.binomial(pilot.num_drawn, share, NUM_RESAMPLES) / pilot.num_drawn - share
    rows = num_rows + pilot.num_input_rows * shares * unseen(pilot.num_drawn, pilot.num_input_rows)
    values = np.array([pilot.prompt_tokens, pilot.generated_tokens, row_seconds(pilot, speed)], np.float64)
    picked = chance.integers(0, pilot.num_rows, (NUM_RESAMPLES, pilot.num_rows))
    means = values.mean(axis=1)
    resampled = means + (values[:, picked].mean(axis=2).T - means) * unseen(pilot.num_rows, num_rows)
    prompts, generated, seconds = range(3)

    def per_row(which: int) -> Interval:
        return _interval(means[which], resampled[:, which])

    def total(which: int) -> Interval:
        return _interval(num_rows * means[which], rows * resampled[:, which])

    busy_s = total(seconds).times(1 / num_engines)
    time_s = Interval(busy_s.value + speed.end_s, busy_s.low + speed.end_s, busy_s.high + speed.end_s)
    return Estimate(
        num_input_rows=pilot.num_input_rows,
        rows=_interval(num_rows, rows),
        num_pilot_rows=pilot.num_rows,
        num_copied=pilot.num_copied,
        num_together=speed.num_together,
        had_queue=speed.had_queue,
        prompt_tokens_per_row=per_row(prompts),
        generated_tokens_per_row=per_row(generated),
        failed_fraction=failed_fraction(pilot.num_failed, pilot.num_rows, num_all_rows=num_rows),
        failures=dict(pilot.failures),
        prompt_tokens=total(prompts),
        generated_tokens=total(generated),
        tokens_per_s=sum(pilot.generated_tokens) / speed.full_s if speed.full_s else 0.0,
        rows_per_s=pilot.num_rows / speed.full_s if speed.full_s else 0.0,
        load_s=load_s,
        num_engines=num_engines,
        time_s=time_s,
        engine_hours=time_s.times(num_engines / 3600),
    )


def row_seconds(pilot: Pilot, speed: Speed) -> list[float]:
    """What each row takes of an engine with a full batch: its part of the time for rounds and of that for prompts."""
    rounds_s = min(speed.full_s, (speed.round_s or 0.0) * sum(step.num_rounds for step in pilot.steps))
    parts = zip(_parts(pilot.num_rounds), _parts(pilot.prompt_tokens), strict=True)
    return [rounds_s * of_rounds + (speed.full_s - rounds_s) * of_prompts for of_rounds, of_prompts in parts]


def failed_fraction(num_failed: int, num_rows: int, *, num_all_rows: float) -> Interval:
    """Wilson's interval for the share of failed rows."""
    share, z = num_failed / num_rows, Z * unseen(num_rows, num_all_rows)
    middle = (share + z**2 / (2 * num_rows)) / (1 + z**2 / num_rows)
    half = z / (1 + z**2 / num_rows) * math.sqrt(share * (1 - share) / num_rows + z**2 / (4 * num_rows**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def unseen(num_seen: int, num_all: float) -> float:
    """How much wider an interval is than nothing when so many of all rows were seen: 1 for few, 0 for all."""
    return math.sqrt(max(0.0, 1.0 - num_seen / num_all))


def _parts(values: Sequence[int]) -> list[float]:
    whole = sum(values)
    return [value / whole if whole else 1 / len(values) for value in values]


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    import numpy as np

    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(value), float(low), float(high))
