"""The Ray backend: shard descriptors are the dataset, manifest entries are what comes back."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.context import AutoscalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dspark_batch import errors
from dspark_batch.batch.executor import WorkerSpec
from dspark_batch.batch.faults import MAX_FRUITLESS_STARTS
from dspark_batch.batch.live import LiveCounts
from dspark_batch.errors import DSparkBatchError, EngineError
from dspark_batch.job.config import RaySection
from dspark_batch.ray_data.actor import ENTRY_COLUMN, SHARD_COLUMN, ShardActor
from dspark_batch.ray_data.cluster import ActorShare, actor_share
from dspark_batch.ray_data.control import Failure, JobControl, Status

if TYPE_CHECKING:
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.shards import Shard

TICK_S = 0.5
DRAIN_S = 10.0
"""How long a job that failed waits for the shards that still run before it says so."""


class RayBackend:
    """Runs shards on a pool of actors. Ray must be initialised; see ``cluster.ray_session``."""

    def __init__(self, spec: WorkerSpec, *, section: RaySection, device: str) -> None:
        self._spec = spec
        self._section = section
        self._share = actor_share(section, device=device)
        self._live = LiveCounts()
        self._is_at_work = False
        self._warnings: tuple[str, ...] = ()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        control = ray.remote(num_cpus=0, scheduling_strategy=here)(JobControl)
        self._control = control.remote(num_actors=section.actors.max)

    def run(self, shards: Sequence[Shard]) -> Iterator[ManifestEntry | None]:
        """The entry of every shard once it is committed; None whenever a moment passed without one.

        Raises the DSparkBatchError that ended an actor, in words of its own, or EngineError for what Ray reports.
        """
        records = _records(self._dataset(shards))
        for record in records:
            self._raise_failure(iter(()) if isinstance(record, BaseException) else records)
            if isinstance(record, BaseException):
                raise EngineError(f"Ray ended the run: {_root_message(record)}") from record
            yield record
        self._raise_failure(records)

    def live(self) -> LiveCounts:
        """What the engines of all actors have produced so far, committed or not."""
        return self._live

    def is_at_work(self) -> bool:
        """Whether any actor has begun a shard."""
        return self._is_at_work

    def warnings(self) -> Sequence[str]:
        """What the engines of all actors warned of so far, each text once, in order."""
        return self._warnings

    def stop(self) -> bool:
        """Begin no further shard. Those that run go on to their commit. False: none has begun."""
        has_begun: bool = ray.get(self._control.stop.remote())
        return has_begun

    def _raise_failure(self, records: Iterator[ManifestEntry | BaseException | None]) -> None:
        """Raise what ended the job. The stream is let run out before, as no further shard begins: Ray's threads would
        complain about a shutdown under their feet."""
        status: Status = ray.get(self._control.status.remote())
        self._live = status.live
        self._is_at_work = status.has_begun
        self._warnings = status.warnings
        if status.failure is None:
            return
        end_s = time.monotonic() + DRAIN_S
        for record in records:
            if isinstance(record, BaseException) or time.monotonic() > end_s:
                break
        raise _as_error(status.failure)

    def _dataset(self, shards: Sequence[Shard]) -> Dataset:
        _configure(DataContext.get_current(), section=self._section)
        items = [{SHARD_COLUMN: pickle.dumps(shard)} for shard in shards]
        return shard_dataset(
            ray.data.from_items(items, override_num_blocks=len(items)),
            spec=self._spec,
            section=self._section,
            share=self._share,
            shards_in_flight=self._spec.config.shards_in_flight(num_shards=len(items)),
            control=self._control,
        )


def shard_dataset(
    descriptors: Dataset,
    *,
    spec: WorkerSpec,
    section: RaySection,
    share: ActorShare,
    shards_in_flight: int,
    control: Any,
) -> Dataset:
    """The lazy dataset of manifest entries for a dataset of shard descriptors, one per block."""
    return descriptors.map_batches(
        ShardActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=section.actors.min,
            max_size=section.actors.max,
            max_tasks_in_flight_per_actor=shards_in_flight,
            max_concurrent_calls_per_actor=shards_in_flight,
        ),
        fn_constructor_args=(spec,),
        fn_constructor_kwargs={
            "shards_in_flight": shards_in_flight,
            "num_threads": share.num_threads,
            "control": control,
        },
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
    )


def _configure(context: DataContext, *, section: RaySection) -> None:
    """A pool grows while every actor has its shards in flight and more wait, and shrinks only when none waits.

    Actors whose process is killed while they load are replaced, within the bound that ``JobControl`` sets.
    """
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = section.load_timeout_s
    context.max_consecutive_actor_init_deaths = MAX_FRUITLESS_STARTS * section.actors.max
    context.autoscaling_config = AutoscalingConfig(
        actor_pool_util_upscaling_threshold=1.0, actor_pool_util_downscaling_threshold=0.0
    )


def _records(dataset: Dataset) -> Iterator[ManifestEntry | BaseException | None]:
    """Streams entries from a thread of its own, so that the caller gets control back every ``TICK_S``."""
    arrived: queue.SimpleQueue[ManifestEntry | BaseException | None] = queue.SimpleQueue()

    def consume() -> None:
        try:
            table: pa.Table
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                if ENTRY_COLUMN in table.column_names:
                    for cell in table.column(ENTRY_COLUMN):
                        arrived.put(pickle.loads(cell.as_py()))
        except BaseException as error:
            arrived.put(error)
        else:
            arrived.put(None)

    threading.Thread(target=consume, name="dspark-batch-ray", daemon=True).start()
    while True:
        try:
            record = arrived.get(timeout=TICK_S)
        except queue.Empty:
            yield None
            continue
        if record is None:
            return
        yield record


def _as_error(failure: Failure) -> DSparkBatchError:
    if failure.problems:
        return errors.ConfigError(failure.problems)
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, DSparkBatchError) and not issubclass(kind, errors.ConfigError):
        return kind(failure.message)
    return EngineError(f"{failure.kind}: {failure.message}")


def _root_message(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
