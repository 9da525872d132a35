"""One process of a run: reads shards, generates their rows on one engine, commits them. The same under every driver."""

from __future__ import annotations

import gc
from concurrent.futures import CancelledError
from dataclasses import dataclass

import pyarrow as pa

from dspark_batch.batch.agreement import check_weights, with_agreed_dtype
from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.contract import RowEngine
from dspark_batch.batch.engines import collected_warnings, make_engine
from dspark_batch.batch.faults import UNSUSPECTED, Trial
from dspark_batch.batch.isolation import EngineGate, NoteStep, generate_in_steps
from dspark_batch.batch.layout import RunTicket
from dspark_batch.batch.live import CountingEngine, EngineLoad, LiveCounts
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.retry import committed_table, merge, only_rows, retryable_rows
from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.service import WorkerService
from dspark_batch.batch.shards import Shard
from dspark_batch.batch.watchdog import Watchdog, describe_hang
from dspark_batch.batch.work import WorkLog
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.job.config import JobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a process needs to work for a run; plain values that travel to any machine. Paths are absolute or URIs.

    ``num_threads`` replaces ``engine.threads: auto``; ``engine_factory`` names another engine than the real one, which
    must have the weights of ``weights_fingerprint``.
    """

    config: JobConfig
    plan_schema: pa.Schema
    fingerprint: str
    run_id: str
    retry_failed: bool = False
    engine_factory: str | None = None
    weights_fingerprint: str | None = None
    num_threads: int | None = None
    ticket: RunTicket | None = None
    """Of the store that the driver opened; it says where to commit, and under which lease."""
    owns_process: bool = False
    """Whether the process is there for this worker alone, and may be ended where it hangs beyond rescue."""

    def open_store(self) -> RunStore:
        """The run's output folder, as a worker commits to it."""
        path = self.config.output.path
        if self.ticket is None:
            return RunStore(path, run_id=self.run_id).join(self.fingerprint)
        return RunStore(path, mode=self.config.output.mode, format=self.config.output.format, ticket=self.ticket)

    def engine_config(self) -> EngineConfig:
        """The engine's settings, with the threads that this process may use."""
        config = self.config.engine_config()
        if self.num_threads is None or config.threads != "auto":
            return config
        return config.model_copy(update={"threads": self.num_threads})


class ShardExecutor:
    """Owns one engine. ``run`` may be called from several threads; their rows share one continuous batch.

    Raises:
        ModelError: the engine's model cannot be loaded.
        ConfigError, InputError, OutputError: the run cannot be worked on from this machine.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._num_samples = spec.config.sampling.n
        self._reader = ShardReader(spec.config, plan_schema=spec.plan_schema)
        self._run = spec.open_store()
        self._engine: CountingEngine | None = None
        self._gate = EngineGate()
        self._work = WorkLog(self._run, counts=self.live, by_position=self._by_position)
        with collected_warnings() as warnings:
            self._service = WorkerService(self._make_worker).start()
        self.warnings = tuple(warnings)
        """What was warned of while the engine was made."""
        # What is loaded by now stays: the collector need not walk it again for the rows that come and go, which would
        # take as long as everything else that is done for a row.
        gc.collect()
        gc.freeze()
        self._work.start(device=None if self._engine is None else self._engine.device)
        self._watchdog = self._start_watchdog()

    def run(
        self, shard: Shard, *, trial: Trial = UNSUSPECTED, note_step: NoteStep = lambda rows, works: None
    ) -> ManifestEntry:
        """Generate and commit one shard; the entry that stands if another attempt has committed it already.

        With ``retry_failed`` the failed rows of a committed shard that may succeed are generated again, and the shard
        is replaced. ``trial`` and ``note_step`` are of a ``FaultLog``, where there is one. Raises EngineError when the
        engine is broken (another process may succeed), InputError and OutputError.
        """
        with self._work.shard():
            return self._commit(shard, trial=trial, note_step=note_step)

    def _commit(self, shard: Shard, *, trial: Trial, note_step: NoteStep) -> ManifestEntry:
        def generated(rows: ShardInput) -> ShardResult:
            return self._generate(rows, trial=trial, note_step=note_step)

        standing = self._run.entry(shard.name)
        if standing is None:
            return self._run.commit(generated(self._reader.read(shard)))
        if not self._spec.retry_failed:
            return standing
        before = committed_table(standing, run=self._run)
        prefix = self._spec.config.output.prefix
        rows = retryable_rows(before, num_samples=self._num_samples, prefix=prefix)
        if not rows:
            return standing
        again = generated(only_rows(self._reader.read(shard), rows))
        merged = merge(before, again, rows=rows, num_samples=self._num_samples, prefix=prefix, entry=standing)
        return self._run.commit(merged, replace=True)

    @property
    def is_hung(self) -> bool:
        """Whether the engine was given up while it hangs: what it holds cannot be freed."""
        return self._service.is_abandoned

    def live(self) -> LiveCounts:
        """What the engine has produced so far, committed or not. Thread-safe."""
        return LiveCounts() if self._engine is None else self._engine.counts

    def load(self) -> EngineLoad:
        """How full the engine is. Thread-safe."""
        return EngineLoad() if self._engine is None else self._engine.load

    def close(self) -> None:
        """Stop the engine after its current round; shards in flight are given up. One that hangs is left as it is."""
        gc.unfreeze()
        self._service.close()
        if self._watchdog is not None:
            self._watchdog.stop()
        self._work.close()
        self._reader.close()
        if self._engine is not None and not self._service.is_abandoned:
            self._engine.close()

    def __enter__(self) -> ShardExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, shard: ShardInput, *, trial: Trial, note_step: NoteStep) -> ShardResult:
        if not (trial.is_isolated and shard.ids):
            with self._gate.shared():
                return self._submit(shard)
        with self._gate.alone():
            if self._service.fault is not None:
                # Not these rows' fault: it broke while they waited.
                raise self._service.fault
            return generate_in_steps(
                shard,
                trial=trial,
                generate=self._submit,
                note_step=note_step,
                num_samples=self._num_samples,
                prefix=self._spec.config.output.prefix,
            )

    def _submit(self, shard: ShardInput) -> ShardResult:
        try:
            return self._service.submit(shard).result()
        except (CancelledError, RuntimeError) as error:
            raise EngineError(f"shard {shard.key}: given up, the engine was closed") from error

    def _by_position(self) -> list[tuple[int, int]]:
        return [] if self._engine is None else self._engine.by_position

    def _start_watchdog(self) -> Watchdog | None:
        engine, service, config = self._engine, self._service, self._spec.config
        assert engine is not None, "the service starts by making the engine"
        if config.engine.watchdog_s is None:
            return None

        def give_up(pause_s: float) -> None:
            doing = f"{service.doing or 'no work'} with {engine.load.num_running} samples"
            service.abandon(EngineError(describe_hang(pause_s=pause_s, thread=service.thread, doing=doing)))

        return Watchdog(
            timeout_s=config.engine.watchdog_s,
            first_timeout_s=config.ray.load_timeout_s,
            progress=lambda: engine.num_processed,
            is_busy=lambda: service.doing is not None,
            on_hang=give_up,
            ends_process=self._spec.owns_process,
        ).start()

    def _make_worker(self) -> BatchWorker:
        self._engine = CountingEngine(self._make_engine())
        return BatchWorker(self._engine, config=self._spec.config, input_schema=self._reader.schema)

    def _make_engine(self) -> RowEngine:
        config = self._spec.engine_config()
        if self._spec.engine_factory is not None:
            return make_engine(config, factory=self._spec.engine_factory)
        engine = make_engine(with_agreed_dtype(config, run=self._run))
        if self._spec.weights_fingerprint is not None:
            check_weights(engine, expected=self._spec.weights_fingerprint, config=config)
        return engine
