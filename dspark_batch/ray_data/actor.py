"""The Ray actor that owns one engine and runs shards to their commit."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
from dspark_batch.errors import DSparkBatchError, EngineError
from dspark_batch.ray_data.control import Failure
from dspark_batch.ray_data.metrics import METRICS_INTERVAL_S, ActorMetrics

if TYPE_CHECKING:
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.shards import Shard

SHARD_COLUMN = "shard"
ENTRY_COLUMN = "entry"
ENTRY_SCHEMA = pa.schema([(ENTRY_COLUMN, pa.binary())])

LIVE_INTERVAL_S = 2.0
"""How often the driver hears what the engine has produced; Ray's metrics are told every ``METRICS_INTERVAL_S``."""

logger = logging.getLogger(__name__)


class ShardActor:
    """Callable class for ``map_batches`` with ``batch_size=1``: a shard descriptor in, its manifest entry out.

    Rows are read, generated and committed here; none of them passes through the object store. Calls overlap, and the
    rows of all shards in flight share one continuous batch. No row comes out for a shard that was not begun because
    the run is stopping.

    An engine that broke or hangs ends this process, so that Ray starts another and gives it the shard again; every
    other error is told to ``control`` for the driver to raise, and ends the job.
    """

    def __init__(self, spec: WorkerSpec, *, shards_in_flight: int, num_threads: int, control: Any) -> None:
        self._control = control
        self._executor: ShardExecutor | None = None
        if not ray.get(control.begin_worker.remote()):
            return
        try:
            self._executor = ShardExecutor(replace(spec, num_threads=num_threads, owns_process=True))
        except Exception as error:
            # Not raised: Ray would print a trace of its own. The driver raises it, and no shard begins here.
            ray.get(control.fail.remote(Failure.of(error)))
            return
        ray.get(control.note_loaded.remote(self._executor.warnings))
        self._name = f"{ray.get_runtime_context().get_node_id()}/{os.getpid()}"
        self._metrics = ActorMetrics(
            run=spec.run_id, model=spec.config.model.target, actor=f"{ray.util.get_node_ip_address()}/{os.getpid()}"
        )
        threading.Thread(target=self._tell_live, name="dspark-batch-live", daemon=True).start()
        self._threads = ThreadPoolExecutor(shards_in_flight, thread_name_prefix="dspark-batch-shard")

    async def __call__(self, batch: pa.Table) -> pa.Table:
        entries = [await self._run(pickle.loads(cell.as_py())) for cell in batch.column(SHARD_COLUMN)]
        return pa.table([[pickle.dumps(entry) for entry in entries if entry is not None]], schema=ENTRY_SCHEMA)

    async def _run(self, shard: Shard) -> ManifestEntry | None:
        executor = self._executor
        trial = None if executor is None else await self._control.begin_shard.remote(shard.name)
        if executor is None or trial is None:
            return None

        def note_step(rows: range, *, works: bool) -> None:
            ray.get(self._control.note_step.remote(shard.name, rows, works=works))

        loop = asyncio.get_running_loop()
        try:
            run = partial(executor.run, shard, trial=trial, note_step=note_step)
            entry = await loop.run_in_executor(self._threads, run)
        except EngineError as error:
            await self._end_process(error, shard=shard)
            raise
        except DSparkBatchError as error:
            await self._control.fail.remote(Failure.of(error))
            raise
        except Exception as error:
            message = f"shard {shard.name}: {type(error).__name__}: {error}"
            await self._control.fail.remote(Failure(kind="OutputError", message=message))
            raise
        self._metrics.note_commit(entry.work)
        await self._control.note_commit.remote(shard.name)
        return entry

    def _tell_live(self) -> None:
        assert self._executor is not None, "told by an actor that works"
        next_metrics_s = time.monotonic()
        while True:
            self._control.note_live.remote(self._name, self._executor.live())
            if time.monotonic() >= next_metrics_s:
                self._metrics.update(self._executor.live(), self._executor.load())
                next_metrics_s = time.monotonic() + METRICS_INTERVAL_S
            time.sleep(LIVE_INTERVAL_S)

    async def _end_process(self, error: EngineError, *, shard: Shard) -> None:
        """Ray retries a shard elsewhere only when the process of its actor dies; an exception would end the job."""
        logger.error("the engine broke, its process ends and is replaced: %s", error)
        await self._control.note_fault.remote(str(error), shard=shard.name)
        os._exit(1)
