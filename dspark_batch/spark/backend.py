"""``engine.backend: spark``: the shards of a job run in Spark tasks, with the same commits as under every driver."""

from __future__ import annotations

import hashlib
import pickle
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import SparkSession

from dspark_batch import errors
from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
from dspark_batch.batch.live import LiveCounts
from dspark_batch.errors import ConfigError, DSparkBatchError, EngineError, Problem
from dspark_batch.spark.executor import prepare_process, process_engines, task_facts
from dspark_batch.spark.session import check_session, executor_cores, setting

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.shards import Shard

TICK_S = 0.2
MANIFEST_INTERVAL_S = 2.0
"""How often the driver looks for new manifest entries; Spark itself hands over results only when all tasks ended."""

SHARDS = "shards binary"
ENTRIES = "entry binary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error that another attempt cannot mend, on its way to the driver."""

    kind: str
    message: str
    problems: tuple[Problem, ...] = ()


class SparkBackend:
    """Deals shards to Spark tasks, each with one engine. Uses the active session, or makes one (``spark-submit``).

    Stopping works through a file in the run's folder, which tasks look for before each shard. What tasks warn of comes
    through files there too, which are removed once they are read.
    """

    def __init__(self, spec: WorkerSpec, *, session: SparkSession | None = None) -> None:
        self._spec = spec
        self._session = session or SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()
        self._store = spec.open_store()
        self._counts = LiveCounts()
        self._warnings: list[str] = []
        check_session(self._session, spec.config)

    def run(self, shards: Sequence[Shard]) -> Iterator[ManifestEntry | None]:
        """See ``Backend.run``. Entries come as their manifest files appear."""
        waiting = {shard.name for shard in shards}
        outcome: queue.SimpleQueue[list[ManifestEntry | Failure] | BaseException] = queue.SimpleQueue()
        threading.Thread(
            target=_collect, args=(self._tasks(shards), outcome), name="dspark-batch-spark", daemon=True
        ).start()
        next_look_s = time.monotonic() + MANIFEST_INTERVAL_S
        while outcome.empty():
            time.sleep(TICK_S)
            if time.monotonic() >= next_look_s:
                self._take_warnings()
                if not self._spec.retry_failed:
                    yield from self._new_entries(waiting)
                next_look_s = time.monotonic() + MANIFEST_INTERVAL_S
            yield None
        self._take_warnings()
        yield None
        yield from self._last_entries(outcome.get(), waiting)

    def live(self) -> LiveCounts:
        """Nothing: between commits, tasks do not report to the driver."""
        return self._counts

    def is_at_work(self) -> bool:
        """Taken to be so from the start, as tasks do not say."""
        return True

    def warnings(self) -> Sequence[str]:
        """See ``Backend.warnings``; also the faults of engines, each of which failed a task."""
        return tuple(self._warnings)

    def stop(self) -> bool:
        """Begin no further shard. Those that run go on to their commit; whether any does is not known here."""
        self._store.write_meta(_stop_name(self._spec.run_id), "stop\n")
        return True

    def _tasks(self, shards: Sequence[Shard]) -> DataFrame:
        num_tasks = min(len(shards), num_engines(self._session, self._spec))
        dealt = [(pickle.dumps(tuple(shards[place::num_tasks])),) for place in range(num_tasks)]
        rows = self._session.createDataFrame(dealt, SHARDS).repartitionByRange(num_tasks, "shards")
        return rows.mapInArrow(ShardTask(self._spec), ENTRIES)

    def _new_entries(self, waiting: set[str]) -> Iterator[ManifestEntry]:
        for name, entry in self._store.committed(verify_checksums=False).items():
            if name in waiting:
                waiting.remove(name)
                yield entry

    def _take_warnings(self) -> None:
        files = self._store.store.files(self._store.ticket.meta).values()
        for file in sorted(files, key=lambda file: file.modified_s):
            name = file.name.rpartition("/")[2]
            if not name.startswith(_warning_prefix(self._spec.run_id)):
                continue
            text = self._store.read_meta(name)
            if text is not None and text not in self._warnings:
                self._warnings.append(text)
            self._store.store.delete(file.name)

    def _last_entries(
        self, outcome: list[ManifestEntry | Failure] | BaseException, waiting: set[str]
    ) -> Iterator[ManifestEntry]:
        if isinstance(outcome, BaseException):
            raise EngineError(f"Spark ended the run: {_root_message(outcome)}") from outcome
        for record in outcome:
            if isinstance(record, Failure):
                raise _as_error(record)
        for record in outcome:
            if not isinstance(record, Failure) and record.shard in waiting:
                waiting.remove(record.shard)
                yield record


def num_engines(session: SparkSession, spec: WorkerSpec) -> int:
    """Tasks that can hold an engine at once: the task slots of all executors, or one per executor with GPUs."""
    tasks = spec.config.spark.tasks
    if tasks != "auto":
        return tasks
    num_executors = int(setting(session, "spark.executor.instances") or 1)
    if setting(session, "spark.executor.resource.gpu.amount") is not None:
        return num_executors
    cores = executor_cores(master=setting(session, "spark.master"), configured=setting(session, "spark.executor.cores"))
    return max(1, num_executors * ((cores or 1) // int(setting(session, "spark.task.cpus") or 1)))


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What runs in a task: its shards, a few at a time, on one engine; manifest entries come back."""

    spec: WorkerSpec

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        shards = [shard for batch in batches for cell in batch.column(0) for shard in pickle.loads(cell.as_py())]
        if not shards:
            return
        facts = task_facts()
        process_engines.close()
        prepare_process(self.spec.config.engine_config(), facts)
        records = self._work(shards, replace(self.spec, num_threads=facts.num_cpus))
        yield pa.record_batch([pa.array([pickle.dumps(record) for record in records], pa.binary())], names=["entry"])

    def _work(self, shards: Sequence[Shard], spec: WorkerSpec) -> list[ManifestEntry | Failure]:
        """Raises EngineError, so that Spark tries the task again; shards that are committed are not generated again."""
        store = spec.open_store()
        if store.read_meta(_stop_name(spec.run_id)) is not None:
            return []
        in_flight = spec.config.shards_in_flight(num_shards=len(shards))
        try:
            with (
                ShardExecutor(spec) as executor,
                ThreadPoolExecutor(in_flight, "dspark-batch-shard") as threads,
            ):
                _warn(store, executor.warnings)
                found = list(threads.map(lambda shard: _run_unless_stopped(shard, executor, store, spec), shards))
        except EngineError as error:
            _warn(store, [f"the engine broke, which failed its Spark task: {error}"])
            raise
        except DSparkBatchError as error:
            store.write_meta(_stop_name(spec.run_id), "stop\n")
            problems = error.problems if isinstance(error, ConfigError) else ()
            return [Failure(kind=type(error).__name__, message=str(error), problems=problems)]
        return [entry for entry in found if entry is not None]


def _run_unless_stopped(
    shard: Shard, executor: ShardExecutor, store: RunStore, spec: WorkerSpec
) -> ManifestEntry | None:
    return None if store.read_meta(_stop_name(spec.run_id)) is not None else executor.run(shard)


def _stop_name(run_id: str) -> str:
    return f"stop-{run_id}"


def _warn(store: RunStore, texts: Iterable[str]) -> None:
    """Tell the driver; equal texts of several tasks are one file."""
    for text in texts:
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        store.write_meta(f"{_warning_prefix(store.run_id)}{digest}", text)


def _warning_prefix(run_id: str) -> str:
    return f"warning-{run_id}-"


def _collect(tasks: DataFrame, outcome: queue.SimpleQueue[list[ManifestEntry | Failure] | BaseException]) -> None:
    try:
        outcome.put([pickle.loads(bytes(row.entry)) for row in tasks.collect()])
    except BaseException as error:
        outcome.put(error)


def _as_error(failure: Failure) -> DSparkBatchError:
    if failure.problems:
        return ConfigError(failure.problems)
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, DSparkBatchError):
        return kind(failure.message)
    return EngineError(f"{failure.kind}: {failure.message}")


def _root_message(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.lstrip().startswith("at ")]
    return lines[-1].strip() if lines else type(error).__name__
