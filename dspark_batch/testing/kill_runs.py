"""One run of the kill matrix: a job starts, a process of it is killed at a drawn moment, and the job must end well."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dspark_batch.testing.kill_job import NUM_SHARDS, SINKS, Audit, Engine, KillJob, Rows, Sink, make_kill_job
from dspark_batch.testing.processes import is_running
from dspark_batch.testing.ray_nodes import ACTOR_TITLE, TwoNodes

Target = Literal["driver", "actor", "raylet"]
SignalName = Literal["SIGKILL", "SIGTERM"]
Phase = Literal["starting", "working", "ending", "ended"]

CELLS = tuple((target, name, sink) for target in get_args(Target) for name in get_args(SignalName) for sink in SINKS)
MAX_RESTARTS = 5
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class KillPlan:
    """What is killed how and when: ``delay_s`` after ``num_commits`` shards are committed.

    ``num_commits`` None: ``delay_s`` after the process to be killed was started.
    """

    seed: int
    run: int
    target: Target
    signal: SignalName
    sink: Sink
    engine: Engine
    num_actors: int
    num_commits: int | None
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KillRecord:
    """What came of a plan. ``phase`` is where the job was when the signal was sent; ``exit_codes`` and ``last_words``
    are the drivers', one each.

    ``num_restarts``: drivers that were started after the first, of which a killed driver needs one. ``problem`` says
    why the run did not reach its end; None where it did, and then there is an ``audit``.
    """

    plan: KillPlan
    phase: Phase
    num_commits_at_kill: int
    exit_codes: tuple[int, ...]
    last_words: tuple[str, ...]
    num_restarts: int
    elapsed_s: float
    audit: Audit | None
    problem: str | None
    victim_ended: bool | None = None
    """Whether the process that got the signal ended before the job did; None where no signal was sent."""

    @property
    def is_hit(self) -> bool:
        """Whether the kill came while the job was under way."""
        return self.phase != "ended"

    @property
    def is_clean(self) -> bool:
        return self.problem is None and self.audit is not None and self.audit.is_clean


class StuckError(Exception):
    """A run waited longer than its patience for something; the message says for what."""


def plan_run(run: int, *, seed: int, engine: Engine = "scripted") -> KillPlan:
    """The plan of a run number. Every ``len(CELLS)`` runs in a row go through all cells, each time in another order."""
    round_number, place = divmod(run, len(CELLS))
    order = list(CELLS)
    random.Random(f"{seed}/{engine}/order/{round_number}").shuffle(order)
    target, name, sink = order[place]
    rng = random.Random(f"{seed}/{engine}/run/{run}")
    num_commits, delay_s = _moment(rng)
    return KillPlan(
        seed=seed,
        run=run,
        target=target,
        signal=name,
        sink=sink,
        engine=engine,
        num_actors=2 if target == "raylet" else 1 if rng.random() < 0.7 else 2,
        num_commits=num_commits,
        delay_s=delay_s,
    )


def kill_run(plan: KillPlan, *, nodes: TwoNodes, folder: Path, expected: Rows, patience_s: float = 120.0) -> KillRecord:
    """Carry out a plan in a folder of its own, which is removed where all went well.

    Raises what goes wrong with the cluster before the job begins; what goes wrong with the job is the record's
    ``problem``.
    """
    started_s = time.monotonic()
    job = make_kill_job(folder, sink=plan.sink, engine=plan.engine, address=nodes.address, num_actors=plan.num_actors)
    run = _Run(plan, job=job, nodes=nodes, deadline_s=started_s + patience_s)
    audit, problem = None, None
    run.prepare()
    try:
        run.strike()
        run.to_the_end()
        audit = job.audit(expected)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}; the last driver wrote:\n{job.last_log()}"
    finally:
        run.end()
    record = KillRecord(
        plan=plan,
        phase=run.phase,
        num_commits_at_kill=run.num_commits_at_kill,
        exit_codes=tuple(run.exit_codes),
        last_words=job.last_words(),
        num_restarts=max(len(job.commands) - 1, 0),
        elapsed_s=round(time.monotonic() - started_s, 2),
        audit=audit,
        problem=problem,
        victim_ended=run.victim_ended,
    )
    if record.is_clean:
        shutil.rmtree(folder)
    return record


class _Run:
    """The state of one run while it goes on."""

    def __init__(self, plan: KillPlan, *, job: KillJob, nodes: TwoNodes, deadline_s: float) -> None:
        self._plan = plan
        self._job = job
        self._nodes = nodes
        self._deadline_s = deadline_s
        self.phase: Phase = "ended"
        self.num_commits_at_kill = 0
        self.exit_codes: list[int] = []
        self.victim_ended: bool | None = None
        self._victim: int | None = None

    def prepare(self) -> None:
        """Wait until both nodes are up and nothing is left of the run before."""
        self._nodes.restore_second()
        self._wait_for(lambda: not self._nodes.processes(title=ACTOR_TITLE), what="the actors of the run before to end")

    def strike(self) -> None:
        """Start the job, wait for the moment, and send the signal, if the job has not ended before."""
        self._start()
        if not self._reached_moment():
            return
        number = signal.Signals[self._plan.signal]
        actors = self._nodes.processes(title=ACTOR_TITLE)
        self.num_commits_at_kill = self._job.num_commits
        self.phase = self._phase_now(has_actors=bool(actors))
        if self.phase == "ended" or (self._plan.target == "actor" and not actors):
            self.phase = "ended"
        elif self._plan.target == "raylet":
            self._nodes.strike_second_raylet(number)
            self.victim_ended = True
            # On a busy machine Ray may not bring a node up in time; the job does without it, the next run waits for it.
            with contextlib.suppress(Exception):
                self._nodes.restore_second()
        else:
            is_driver = self._plan.target == "driver"
            self._victim = self._job.command.driver.process.pid if is_driver else min(actors)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._victim, number)
            self.victim_ended = False

    def to_the_end(self) -> None:
        """Give the same command again until it ends well. Raises StuckError."""
        while True:
            self._wait_for(self._has_ended_by_now, what="the driver to end")
            self.exit_codes.append(self._job.command.poll() or 0)
            if self.exit_codes[-1] == 0:
                break
            if len(self.exit_codes) > MAX_RESTARTS:
                raise StuckError(f"{MAX_RESTARTS} restarts did not bring the job to its end")
            self._start()
        if not self._job.is_complete:
            raise StuckError("the driver ended with 0 and wrote no _SUCCESS")

    def end(self) -> None:
        """End a driver that still runs."""
        if self._job.commands and not self._has_ended():
            self._job.command.driver.kill()

    def _start(self) -> None:
        self._job.start(self._nodes.driver())

    def _has_ended(self) -> bool:
        return self._job.command.poll() is not None

    def _has_ended_by_now(self) -> bool:
        """Also looks after the process that got the signal."""
        if self.victim_ended is False and self._victim is not None:
            self.victim_ended = not is_running(self._victim)
        return self._has_ended()

    def _reached_moment(self) -> bool:
        """Wait for it; False where the driver ended before."""
        plan = self._plan

        def is_due() -> bool:
            if self._has_ended():
                return True
            if plan.num_commits is not None:
                return self._job.num_commits >= plan.num_commits
            return plan.target != "actor" or bool(self._nodes.processes(title=ACTOR_TITLE))

        self._wait_for(is_due, what=f"{plan.num_commits} commits")
        end_s = time.monotonic() + plan.delay_s
        while not self._has_ended() and time.monotonic() < end_s:
            time.sleep(POLL_S)
        return not self._has_ended()

    def _phase_now(self, *, has_actors: bool) -> Phase:
        if self._has_ended() or self._job.is_complete:
            return "ended"
        if self.num_commits_at_kill >= NUM_SHARDS:
            return "ending"
        return "working" if has_actors else "starting"

    def _wait_for(self, condition: Callable[[], bool], *, what: str) -> None:
        _wait(condition, what=what, limit_s=self._deadline_s - time.monotonic())


def _moment(rng: random.Random) -> tuple[int | None, float]:
    """A fifth early, a fifth around the last commit and the publication, the rest while shards are committed."""
    kind = rng.random()
    if kind < 0.2:
        return None, rng.uniform(0.0, 3.0)
    if kind < 0.8:
        return rng.randint(1, NUM_SHARDS - 2), rng.uniform(0.0, 0.3)
    return NUM_SHARDS - rng.randint(0, 1), rng.uniform(0.0, 0.2)


def _wait(condition: Callable[[], bool], *, what: str, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            raise StuckError(f"waited in vain for {what}")
        time.sleep(POLL_S)
