"""The engine in this process, on a thread of its own; in a Python worker of Spark or in a sidecar."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from dspark_batch.batch.engines import make_engine
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.service import WorkerService
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.spark.client import ROW_ID_COLUMN, Chunk
from dspark_batch.spark.sharing import SharedEngine

MAX_WORKERS = 64
"""Jobs whose workers are kept between chunks. A worker is cheap; it remembers parsed templates and equal prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assigned(ShardInput):
    worker: BatchWorker


class WorkerGroup:
    """Several batch workers on one engine, to be driven as one by a ``WorkerService``."""

    def __init__(self) -> None:
        self._active: dict[int, BatchWorker] = {}

    @property
    def num_open_shards(self) -> int:
        return sum(worker.num_open_shards for worker in self._active.values())

    def open(self, shard: ShardInput) -> None:
        assert isinstance(shard, _Assigned)
        self._active[id(shard.worker)] = shard.worker
        shard.worker.open(shard)

    def advance(self) -> None:
        for worker in tuple(self._active.values()):
            worker.advance()

    def take_finished(self) -> list[ShardResult]:
        finished = [result for worker in self._active.values() for result in worker.take_finished()]
        self._active = {key: worker for key, worker in self._active.items() if worker.num_open_shards}
        return finished


class EngineHost:
    """An ``EngineClient`` whose engine is here. Loads the model; raises what loading raises."""

    def __init__(self, config: EngineConfig, *, factory: str | None = None) -> None:
        self._config = config
        self._factory = factory
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._workers: dict[tuple[str, str], BatchWorker] = {}
        self._shared: SharedEngine | None = None
        self._service = WorkerService(self._make_group).start()

    @property
    def max_concurrency(self) -> int:
        return self._engine.engine.max_concurrency

    @property
    def is_broken(self) -> bool:
        """Whether the engine failed; the host is then of no more use."""
        return self._service.fault is not None

    def submit(self, chunk: Chunk) -> Future[pa.Table]:
        """See ``EngineClient.submit``; a job that does not fit raises ConfigError here."""
        with self._lock:
            worker = self._worker(chunk)
            key = f"chunk-{next(self._numbers)}"
        ids = tuple(str(row_id) for row_id in chunk.table.column(ROW_ID_COLUMN).to_pylist())
        shard = _Assigned(key=key, table=chunk.table, ids=ids, worker=worker)
        outcome: Future[pa.Table] = Future()
        source = self._service.submit(shard)
        outcome.add_done_callback(lambda done: source.cancel() if done.cancelled() else None)
        source.add_done_callback(lambda done: _pass_on(done, outcome))
        return outcome

    def release(self, futures: Collection[Future[pa.Table]]) -> None:
        """See ``EngineClient.release``."""
        for future in futures:
            future.cancel()

    def close(self) -> None:
        """Stop after the current round and free the engine."""
        self._service.close()
        self._engine.engine.close()

    @property
    def _engine(self) -> SharedEngine:
        assert self._shared is not None, "the service starts by making the engine"
        return self._shared

    def _make_group(self) -> WorkerGroup:
        self._shared = SharedEngine(make_engine(self._config, factory=self._factory))
        return WorkerGroup()

    def _worker(self, chunk: Chunk) -> BatchWorker:
        key = (chunk.job.model_dump_json(), chunk.table.schema.to_string())
        worker = self._workers.pop(key, None)
        if worker is None:
            worker = BatchWorker(self._engine.view(), config=chunk.job, input_schema=chunk.table.schema)
        self._workers[key] = worker
        while len(self._workers) > MAX_WORKERS:
            del self._workers[next(iter(self._workers))]
        return worker


def _pass_on(done: Future[ShardResult], outcome: Future[pa.Table]) -> None:
    if not outcome.set_running_or_notify_cancel():
        return
    if done.cancelled():
        outcome.set_exception(EngineError("the engine was closed while rows waited for it"))
        return
    error = done.exception()
    if error is None:
        outcome.set_result(done.result().table)
    elif isinstance(error, Exception):
        outcome.set_exception(error)
    else:
        outcome.set_exception(EngineError(f"the engine was closed while rows waited for it: {error!r}"))
