"""The commands behind ``dspark-batch run``: run, dry run, preview. Each gives an exit code and a text to show."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

from dspark_batch.errors import DSparkBatchError, LeaseLostError
from dspark_batch.job.backend import Backend
from dspark_batch.job.config import ConfigLike
from dspark_batch.job.drive import Bounds, Ending, bound_reached, drive, say_nothing_began
from dspark_batch.job.loader import dump_config
from dspark_batch.job.local import LocalBackend
from dspark_batch.job.outcome import Outcome, Totals
from dspark_batch.job.prepare import PreparedRun, Remaining, prepare, remaining
from dspark_batch.job.progress import Work, counted, progress_report
from dspark_batch.job.report import write_report
from dspark_batch.job.signals import StoppedEarlyError, StopRequest, made_unless_stopped
from dspark_batch.job.summary import Finished, describe, ending_outcome, exit_code, nothing_to_do, planned_rows
from dspark_batch.provenance import device_facts

if TYPE_CHECKING:
    from dspark_batch.batch.executor import WorkerSpec


def run_job(
    config: ConfigLike,
    *,
    overrides: Sequence[str] = (),
    retry_failed: bool = False,
    verify: bool = False,
    progress: TextIO | None = None,
) -> Outcome:
    """Run a job, or go on with it, until its end or an early stop. Progress goes to stderr unless given.

    ``config`` is a YAML file, its sections as a mapping, or a ``JobConfig``; ``overrides`` (``"sampling.seed=1"``) are
    laid over it. Whether the rows went through, ``Outcome.is_success`` says, and ``Outcome.text`` the rest.

    Holds the output's lease meanwhile; see ``output.on_conflict``. From then on a first SIGTERM or Ctrl-C waits for the
    moment when shards are made, and an end of the run that has begun is brought to its end. ``verify`` compares the
    checksums of what was committed before. Raises ConfigError, InputError, OutputError, ModelError or EngineError where
    the run cannot begin or go on; what was committed before stays.
    """
    from dspark_batch.batch.lease import acquire_lease

    stream = progress or sys.stderr

    def prepared() -> PreparedRun:
        return prepare(config, overrides=overrides, retry_failed=retry_failed, may_finish_swap=True)

    run = prepared()
    with acquire_lease(
        run.store.store,
        run_id=run.store.run_id,
        on_conflict=run.config.output.on_conflict,
        expected_epoch=run.lease_epoch,
        say=lambda text: _say(stream, text),
    ) as lease:
        if lease.had_others:
            run = prepared()
        run.store.hold(lease)
        with StopRequest() as stop:
            return _run_to_end(run, retry_failed=retry_failed, verify=verify, stream=stream, stop=stop)


def _say(stream: TextIO, text: str) -> None:
    stream.write(f"dspark-batch: {text}\n")


def _run_to_end(run: PreparedRun, *, retry_failed: bool, verify: bool, stream: TextIO, stop: StopRequest) -> Outcome:
    left = remaining(run, retry_failed=retry_failed, verify=verify)
    if not left.shards:
        return _close_without_work(run, left, retry_failed=retry_failed)
    bounds = Bounds(
        max_failed_rows=run.config.limits.max_failed_fraction * run.plan.num_rows,
        max_generated_tokens=run.config.limits.max_generated_tokens,
        max_run_s=run.config.limits.max_run_s,
    )
    before = bound_reached(left.totals, bounds)
    if before is not Ending.DONE:
        return ending_outcome(Finished(run=run, ending=before, done=Totals(), whole=left.totals, elapsed_s=0.0))
    _begin(run)
    if verify:
        run.store.discard([shard.name for shard in left.shards if shard.name not in left.committed])
    try:
        finished = _work(run, left, bounds=bounds, retry_failed=retry_failed, stream=stream, stop=stop)
    except LeaseLostError:
        raise
    except DSparkBatchError:
        write_report(run)
        raise
    return _finish(finished)


def dry_run_job(config: ConfigLike, *, overrides: Sequence[str] = ()) -> Outcome:
    """Check a job as ``run_job`` would and say what it would do. Loads no model and writes nothing."""
    run = prepare(config, overrides=overrides)
    return describe(run, remaining(run))


def _begin(run: PreparedRun) -> None:
    run.store.open(run.fields, anew=run.resolved.begins_anew)
    run.resolved.save(run.store)
    run.store.write_meta("run.yaml", dump_config(run.config))
    run.store.withdraw_success()
    run.store.sweep()


def _work(
    run: PreparedRun, left: Remaining, *, bounds: Bounds, retry_failed: bool, stream: TextIO, stop: StopRequest
) -> Finished:
    work = Work(
        num_rows=left.num_rows,
        num_shards=len(left.shards),
        num_samples_per_row=run.config.sampling.n,
        max_tokens_per_row=run.config.max_tokens_per_row,
    )
    done, whole = Totals(), left.totals
    with ExitStack() as stack:
        report = stack.enter_context(progress_report(work, stream=stream))
        todo = f"{planned_rows(work.num_rows, run.config)} in {counted(work.num_shards, 'shard')}"
        report.say(f"{todo} to do; loading {run.config.model.target}")
        try:
            backend = stack.enter_context(
                _backend(run, num_shards=work.num_shards, retry_failed=retry_failed, stop=stop)
            )
        except StoppedEarlyError:
            say_nothing_began(report, stop)
            return Finished(run=run, ending=Ending.SIGNAL, done=done, whole=whole, elapsed_s=0.0)
        stop.take_signals()
        begin_s, start_s = time.time(), time.monotonic()
        ending = drive(backend, left.shards, done=done, whole=whole, bounds=bounds, report=report, stop=stop)
        elapsed_s = time.monotonic() - start_s
    return Finished(run=run, ending=ending, done=done, whole=whole, elapsed_s=elapsed_s, begin_s=begin_s)


@contextmanager
def _backend(run: PreparedRun, *, num_shards: int, retry_failed: bool, stop: StopRequest) -> Iterator[Backend]:
    from dspark_batch.batch.executor import WorkerSpec

    spec = WorkerSpec(
        config=run.config,
        plan_schema=run.plan.schema,
        fingerprint=run.fingerprint,
        run_id=run.store.run_id,
        retry_failed=retry_failed,
        engine_factory=run.engine_factory,
        weights_fingerprint=str(run.fields["model.weights"]),
        ticket=run.store.ticket,
    )
    if run.config.engine.backend == "local":
        from dspark_batch.batch.restart import RestartingExecutor

        with made_unless_stopped(lambda: RestartingExecutor(spec), stop=stop) as executor:
            yield LocalBackend(
                executor.run,
                live=executor.live,
                shards_in_flight=run.config.shards_in_flight(num_shards=num_shards),
                restart=executor.restart,
                warnings=executor.warnings,
            )
        return
    if run.config.engine.backend == "spark":
        from dspark_batch.spark.backend import SparkBackend

        yield SparkBackend(spec)
        return
    with _ray_backend(run, spec) as backend:
        yield backend


@contextmanager
def _ray_backend(run: PreparedRun, spec: WorkerSpec) -> Iterator[Backend]:
    from dspark_batch.ray_data.environment import cluster_address, prepare_driver_environment

    prepare_driver_environment(cluster_address(run.config.ray.address))
    from dspark_batch.ray_data.cluster import ray_session
    from dspark_batch.ray_data.pipeline import RayBackend

    with ray_session(run.config.ray):
        yield RayBackend(spec, section=run.config.ray, device=run.config.engine.device)


def _close_without_work(run: PreparedRun, left: Remaining, *, retry_failed: bool) -> Outcome:
    from dspark_batch.batch.finish import finish_run, is_complete

    _begin_if_new(run)
    outcome = nothing_to_do(run, left.totals, retry_failed=retry_failed)
    if outcome.is_success and not is_complete(run.store, plan=run.plan):
        finish_run(run.store, plan=run.plan, config=run.config)
        write_report(run)
    return outcome


def _begin_if_new(run: PreparedRun) -> None:
    if not run.has_saved_plan:
        _begin(run)


def _finish(finished: Finished) -> Outcome:
    from dspark_batch.batch.finish import finish_run
    from dspark_batch.job.records import append_metrics

    run = finished.run
    append_metrics(finished, device=device_facts())
    if exit_code(run, finished.whole, ending=finished.ending).is_success:
        finish_run(run.store, plan=run.plan, config=run.config)
    about_cost, loaded_s = write_report(run)
    return ending_outcome(finished, about_cost=about_cost, loaded_s=loaded_s)
