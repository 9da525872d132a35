"""The engine of a run in this process: made anew where it breaks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence

from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
from dspark_batch.batch.faults import FaultLog
from dspark_batch.batch.live import LiveCounts
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.shards import Shard
from dspark_batch.errors import EngineError


class RestartingExecutor:
    """A ``ShardExecutor`` and, once its engine broke and nobody runs shards on it, the next. Raises as that does."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._faults = FaultLog(num_engines=1)
        self._lock = threading.Lock()
        self._before = LiveCounts()
        self._executor: ShardExecutor | None = None
        self._load()

    def run(self, shard: Shard) -> ManifestEntry:
        """See ``ShardExecutor.run``. Thread-safe. Raises EngineError where the engine broke; see ``restart``."""
        assert self._executor is not None, "the engine is gone"
        with self._lock:
            trial = self._faults.begin(shard.name)
        self._raise_end()

        def note_step(rows: range, *, works: bool) -> None:
            with self._lock:
                self._faults.note_step(shard.name, rows, works=works)

        try:
            entry = self._executor.run(shard, trial=trial, note_step=note_step)
        except EngineError as error:
            with self._lock:
                self._faults.note_fault(str(error), shard=shard.name)
            raise
        with self._lock:
            self._faults.note_commit(shard.name)
        return entry

    def restart(self, fault: EngineError) -> None:
        """Replace the engine that broke. Raises what makes that impossible: ``fault`` where it hangs, EngineError where
        the run has seen too many of them, ModelError."""
        assert self._executor is not None, "the engine is gone"
        if self._executor.is_hung:
            raise fault
        self._before += self._executor.live()
        self._executor.close()
        # Its memory has to be free for the next one.
        self._executor = None
        gc.collect()
        self._load()

    def live(self) -> LiveCounts:
        """What all engines have produced. Thread-safe."""
        executor = self._executor
        return self._before if executor is None else self._before + executor.live()

    def warnings(self) -> Sequence[str]:
        """What engines warned of so far, each text once, in order. Thread-safe."""
        return tuple(self._faults.warnings)

    def close(self) -> None:
        """See ``ShardExecutor.close``."""
        if self._executor is not None:
            self._executor.close()

    def __enter__(self) -> RestartingExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> None:
        self._faults.begin_engine()
        self._raise_end()
        self._executor = ShardExecutor(self._spec)
        self._faults.note_loaded(self._executor.warnings)

    def _raise_end(self) -> None:
        if self._faults.end_reason is not None:
            raise EngineError(self._faults.end_reason)
