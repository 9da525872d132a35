"""Drives a backend to the end of the run, or to an earlier stop: signal, token or time budget, too many failed rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from dspark_batch.job.backend import Backend
from dspark_batch.job.outcome import Totals
from dspark_batch.job.progress import ProgressReport
from dspark_batch.job.signals import StopRequest

if TYPE_CHECKING:
    from dspark_batch.batch.shards import Shard

GRACE_S = 60.0
"""How long running shards may take to commit after a signal."""


class Ending(StrEnum):
    """Why ``drive`` returned."""

    DONE = "done"
    SIGNAL = "signal"
    GRACE_OVER = "grace_over"
    TOKEN_BUDGET = "token_budget"
    TIME_BUDGET = "time_budget"
    TOO_MANY_FAILED = "too_many_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """When to stop early. Rows and tokens count over the whole run, committed shards of earlier processes included;
    time counts from the start of ``drive``."""

    max_failed_rows: float
    max_generated_tokens: int | None
    max_run_s: float | None


def drive(
    backend: Backend,
    shards: Sequence[Shard],
    *,
    done: Totals,
    whole: Totals,
    bounds: Bounds,
    report: ProgressReport,
    stop: StopRequest,
    grace_s: float = GRACE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    """Run ``shards``; add what is committed to ``done`` (this process) and ``whole`` (all shards of the run).

    After an early stop the running shards are given time to commit: without limit for bounds, ``grace_s`` for signals.
    Raises whatever ended the backend.
    """
    if stop.is_asked():
        say_nothing_began(report, stop)
        return Ending.SIGNAL
    start_s = clock()
    ending = Ending.DONE
    deadline_s: float | None = None
    num_told = 0
    for entry in backend.run(shards):
        if entry is not None:
            done.add(entry.work, shard=entry.shard)
            whole.add(entry.stats, shard=entry.shard)
        if backend.is_at_work():
            report.update(done, backend.live())
        for warning in backend.warnings()[num_told:]:
            report.say(f"warning: {warning}")
            num_told += 1
        if deadline_s is None and stop.is_asked():
            deadline_s = clock() + grace_s
            ending = Ending.SIGNAL
            if not backend.stop():
                say_nothing_began(report, stop)
                return ending
            report.say(
                f"{stop.signal_name}: beginning no more shards; those that run get {grace_s:.0f} s to commit "
                "(once more to end at once)"
            )
        elif ending is Ending.DONE:
            ending = bound_reached(whole, bounds, elapsed_s=clock() - start_s)
            if ending is not Ending.DONE and not backend.stop():
                return ending
        if deadline_s is not None and clock() > deadline_s:
            return Ending.GRACE_OVER
    if ending is not Ending.DONE and done.num_shards == len(shards):
        return Ending.DONE
    return ending


def say_nothing_began(report: ProgressReport, stop: StopRequest) -> None:
    """Acknowledge a signal that came before anything was decoded."""
    report.say(f"{stop.signal_name}: no shard has begun, ending now (once more to end at once)")


def bound_reached(whole: Totals, bounds: Bounds, *, elapsed_s: float = 0.0) -> Ending:
    """The bound that the run has reached, or ``DONE`` for none."""
    if whole.num_failed_rows > bounds.max_failed_rows:
        return Ending.TOO_MANY_FAILED
    if bounds.max_generated_tokens is not None and whole.num_generated_tokens >= bounds.max_generated_tokens:
        return Ending.TOKEN_BUDGET
    if bounds.max_run_s is not None and elapsed_s >= bounds.max_run_s:
        return Ending.TIME_BUDGET
    return Ending.DONE
