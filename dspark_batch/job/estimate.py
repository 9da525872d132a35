"""``estimate``: what a job would take, from a pilot of some of its rows that is decoded in this process."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from dspark_batch.errors import InputError
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.job.forecast import Estimate, Interval, Pilot, estimate_of
from dspark_batch.job.loader import absolute_paths, load_config
from dspark_batch.job.outcome import ExitCode, Outcome
from dspark_batch.job.prepare import check_columns
from dspark_batch.job.progress import counted, format_duration

if TYPE_CHECKING:
    from dspark_batch.batch.pilot import Drawn, TimedEngine
    from dspark_batch.batch.reader import ShardReader
    from dspark_batch.batch.results import ShardResult

FEWEST_ROWS, MOST_ROWS = 48, 512
"""Rows of a pilot, by default; within them twice what the engine decodes together, so that its batch is full."""
NUM_WARM_UP_ROWS, NUM_WARM_UP_TOKENS = 8, 16
SEED = 0


def estimate_job(
    config: ConfigLike,
    *,
    overrides: Sequence[str] = (),
    num_rows: int | None = None,
    price_per_engine_hour: float | None = None,
    as_json: bool = False,
    progress: TextIO | None = None,
) -> Outcome:
    """Generate a pilot of ``num_rows`` rows, drawn at random, and say what the whole job would take.

    The output is neither written nor looked at: the estimate is of the whole input. Progress goes to stderr unless
    given. Raises as ``run_job``, and InputError where there is no row to estimate from.
    """
    from dspark_batch.batch.engines import configured_factory, make_engine
    from dspark_batch.batch.pilot import TimedEngine, draw_rows
    from dspark_batch.batch.planning import plan_input
    from dspark_batch.batch.reader import ShardReader

    job = absolute_paths(load_config(config, overrides=overrides))
    plan = plan_input(job)
    check_columns(job, plan)
    job = _without_carried_columns(job)
    reader = ShardReader(job, plan_schema=plan.schema)
    stream = progress or sys.stderr
    _say(stream, f"loading {job.model.target}")
    start_s = time.perf_counter()
    engine = TimedEngine(make_engine(job.engine_config(), factory=configured_factory()))
    load_s = time.perf_counter() - start_s
    try:
        wanted = num_rows or default_rows(engine.max_concurrency, num_samples=job.sampling.n)
        drawn = draw_rows(plan, reader, id_column=job.input.id, num_rows=wanted + NUM_WARM_UP_ROWS, seed=SEED)
        if not drawn.ids:
            raise InputError(_nothing_drawn(job, drawn))
        num_warm_up = max(len(drawn.ids) - wanted, min(NUM_WARM_UP_ROWS, len(drawn.ids) // 8))
        _say(stream, f"generating {counted(len(drawn.ids) - num_warm_up, 'row')} drawn at random")
        pilot = _run_pilot(job, engine, reader, drawn, num_warm_up=num_warm_up, num_input_rows=plan.num_rows)
    finally:
        engine.close()
        reader.close()
    estimate = estimate_of(pilot, num_engines=_num_engines(job), load_s=load_s)
    price = None if price_per_engine_hour is None else estimate.engine_hours.times(price_per_engine_hour)
    notes = tuple(_notes(estimate, job, max_concurrency=engine.max_concurrency))
    if as_json:
        values = {**asdict(estimate), "price": None if price is None else asdict(price), "notes": notes}
        return Outcome(code=ExitCode.OK, text=json.dumps(values))
    return Outcome(code=ExitCode.OK, text="\n".join([*_table(estimate, job, price=price), *notes]))


def default_rows(max_concurrency: int, *, num_samples: int) -> int:
    """Rows of a pilot for an engine that decodes ``max_concurrency`` samples together."""
    return min(MOST_ROWS, max(FEWEST_ROWS, _filling_rows(max_concurrency, num_samples=num_samples)))


def _filling_rows(max_concurrency: int, *, num_samples: int) -> int:
    """Rows whose samples keep a batch full until the last of them decode."""
    return math.ceil(2 * max_concurrency / num_samples)


def _without_carried_columns(job: JobConfig) -> JobConfig:
    """The job for callers that look at no rows; unchanged where its rows would have no column at all."""
    from dspark_batch.batch.prompts import prompt_columns

    if job.input.id is None and not prompt_columns(job.prompt):
        return job
    return job.model_copy(update={"input": job.input.model_copy(update={"columns": []})})


def _run_pilot(
    job: JobConfig, engine: TimedEngine, reader: ShardReader, drawn: Drawn, *, num_warm_up: int, num_input_rows: int
) -> Pilot:
    """The first of the rows, briefly, to warm up, and then the others on the clock."""
    from dspark_batch.batch.worker import BatchWorker

    def generated(config: JobConfig, start: int, stop: int) -> ShardResult:
        worker = BatchWorker(engine, config=config, input_schema=reader.schema)
        engine.begin()
        return next(iter(worker.run_shards([drawn.rows(start, stop)])))

    if num_warm_up:
        short = min(NUM_WARM_UP_TOKENS, job.sampling.max_new_tokens)
        sampling = job.sampling.model_copy(update={"max_new_tokens": short})
        generated(job.model_copy(update={"sampling": sampling}), 0, num_warm_up)
    result = generated(job, num_warm_up, len(drawn.ids))

    def by_row(name: str, join: Callable[[Sequence[int]], int]) -> list[int]:
        values: list[Any] = result.table.column(job.output.name_of(name)).to_pylist()
        return [join(values[start : start + job.sampling.n]) for start in range(0, len(values), job.sampling.n)]

    return Pilot(
        num_input_rows=num_input_rows,
        num_drawn=drawn.num_drawn,
        num_passing=drawn.num_passing,
        prompt_tokens=by_row("num_prompt_tokens", max),
        generated_tokens=by_row("num_generated_tokens", sum),
        num_rounds=by_row("num_rounds", sum),
        steps=tuple(engine.steps),
        num_failed=result.stats.num_failed_rows,
        failures=result.stats.num_failed_by_code,
        num_copied=result.stats.num_copied_rows,
    )


def _num_engines(job: JobConfig) -> int:
    if job.engine.backend == "ray":
        return job.ray.actors.max
    return job.spark.tasks if job.engine.backend == "spark" and job.spark.tasks != "auto" else 1


def _nothing_drawn(job: JobConfig, drawn: Drawn) -> str:
    if not drawn.num_drawn:
        return f"{job.input.path}: the input has no rows, so there is nothing to estimate from"
    looked = f"none of {counted(drawn.num_drawn, 'row')} drawn at random"
    return f"{job.input.path}: {looked} passes input.filter={job.input.filter!r}, so there is nothing to estimate from"


def _table(estimate: Estimate, job: JobConfig, *, price: Interval | None) -> list[str]:
    """The figures, one a line."""
    rows = f"{estimate.num_input_rows:,}"
    if job.input.filter is not None:
        rows = f"{_span(estimate.rows, _whole)} of at most {rows} (before input.filter)"
    failed = _span(estimate.failed_fraction, lambda share: f"{100 * share:.1f} %")
    if estimate.failures:
        failed += ": " + ", ".join(f"{code} {count}" for code, count in estimate.failures.items())
    where = "a machine like this one"
    if estimate.num_engines > 1:
        where = f"{estimate.num_engines} engines, each on a machine like this one"
    one_engine = f"by one engine, {estimate.num_together} samples together"
    rates = {
        "generated tokens per row": _span(estimate.generated_tokens_per_row, _one_place),
        "generated tokens": _span(estimate.generated_tokens, _whole),
        "generated tokens/s": f"{estimate.tokens_per_s:,.0f} {one_engine}",
    }
    if job.max_tokens_per_row is None:
        rates = {"rows/s": f"{estimate.rows_per_s:,.1f} {one_engine}"}
    facts = {
        "rows": rows,
        "pilot": f"{counted(estimate.num_pilot_rows, 'row')} drawn at random",
        "prompt tokens per row": _span(estimate.prompt_tokens_per_row, _one_place),
        "failed rows": failed,
        "prompt tokens": _span(estimate.prompt_tokens, _whole),
        **rates,
        "time": f"{_span(estimate.time_s, format_duration)} on {where}",
        "loading": f"{format_duration(estimate.load_s)} for each engine, in neither the time nor the engine-hours",
        "engine-hours": _span(estimate.engine_hours, _small),
    }
    if price is not None:
        facts["price"] = _span(price, _small)
    width = max(map(len, facts))
    return [f"{name:<{width}}  {fact}" for name, fact in facts.items()]


def _notes(estimate: Estimate, job: JobConfig, *, max_concurrency: int) -> Iterator[str]:
    """What the figures do not know."""
    all_rows = round(estimate.rows.value)
    if estimate.num_pilot_rows < all_rows:
        yield (
            "in brackets: 90 % intervals. They know that other rows could have been drawn, and not what else a machine "
            "does"
        )
    else:
        yield "the pilot had all rows, so there are no intervals; what else a machine does is not known"
    has_more_rows = estimate.num_pilot_rows + NUM_WARM_UP_ROWS < all_rows
    if not estimate.had_queue and estimate.num_together < max_concurrency and has_more_rows:
        num_together = min(max_concurrency, all_rows * job.sampling.n)
        num_rows = min(_filling_rows(max_concurrency, num_samples=job.sampling.n), all_rows)
        yield (
            f"the job decodes up to {num_together} samples together, the pilot {estimate.num_together}: the job is "
            f"faster than this; --rows {num_rows} fills the batch"
        )
    if estimate.num_copied:
        copied = counted(estimate.num_copied, "row")
        yield f"{copied} of the pilot took the text of an equal prompt; a shard may hold more of them, and be faster"
    limit = job.limits.max_failed_fraction
    if estimate.failed_fraction.value > limit:
        yield f"more rows failed than limits.max_failed_fraction={limit} allows: the run would end with code 4"


def _span(interval: Interval, form: Callable[[float], str]) -> str:
    value, low, high = map(form, (interval.value, interval.low, interval.high))
    return value if low == high else f"{value} ({low} to {high})"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _one_place(value: float) -> str:
    return f"{value:,.1f}"


def _small(value: float) -> str:
    """Hundredths, and three digits that count below one."""
    return f"{value:,.2f}" if value == 0 or value >= 1 else f"{value:.3g}"


def _say(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()
