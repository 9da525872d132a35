"""The backend without a framework: one engine and a few shards in flight, in this process."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dspark_batch.errors import EngineError
from dspark_batch.job.backend import TICK_S

if TYPE_CHECKING:
    from dspark_batch.batch.live import LiveCounts
    from dspark_batch.batch.manifest import ManifestEntry
    from dspark_batch.batch.shards import Shard


class LocalBackend:
    """Runs ``run_shard`` (read, generate, commit; thread-safe) on ``shards_in_flight`` threads.

    The threads are daemons: a process that is told to end at once does not wait for them, and what they had not
    committed is done again by the next run. When the engine breaks, all of them end, ``restart`` replaces it (or raises
    what speaks against that), and they begin anew. Without ``restart``, or after ``stop``, the fault ends the run.
    """

    def __init__(
        self,
        run_shard: Callable[[Shard], ManifestEntry],
        *,
        live: Callable[[], LiveCounts],
        shards_in_flight: int,
        restart: Callable[[EngineError], None] | None = None,
        warnings: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._run_shard = run_shard
        self._live = live
        self._num_threads = shards_in_flight
        self._restart = restart
        self._warnings = warnings
        self._stopped = False
        self._fault: EngineError | None = None
        self._waiting: deque[Shard] = deque()
        self._done: queue.SimpleQueue[ManifestEntry | BaseException | None] = queue.SimpleQueue()

    def run(self, shards: Sequence[Shard]) -> Iterator[ManifestEntry | None]:
        """See ``Backend.run``."""
        self._waiting.extend(shards)
        while self._waiting:
            yield from self._run_threads()
            fault, self._fault = self._fault, None
            if fault is None:
                return
            if self._restart is None or self._stopped:
                raise fault
            yield None
            self._restart(fault)

    def live(self) -> LiveCounts:
        """See ``Backend.live``."""
        return self._live()

    def is_at_work(self) -> bool:
        """See ``Backend.is_at_work``."""
        return True

    def warnings(self) -> Sequence[str]:
        """See ``Backend.warnings``."""
        return self._warnings()

    def stop(self) -> bool:
        """See ``Backend.stop``."""
        self._stopped = True
        self._waiting.clear()
        return True

    def _run_threads(self) -> Iterator[ManifestEntry | None]:
        """Until no shard waits or the engine broke, and no thread runs."""
        num_running = min(self._num_threads, len(self._waiting))
        for number in range(num_running):
            threading.Thread(target=self._work, name=f"dspark-batch-shard-{number}", daemon=True).start()
        while num_running:
            try:
                outcome = self._done.get(timeout=TICK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(outcome, BaseException):
                self.stop()
                raise outcome
            if outcome is None:
                num_running -= 1
            else:
                yield outcome

    def _work(self) -> None:
        try:
            while self._fault is None:
                try:
                    shard = self._waiting.popleft()
                except IndexError:
                    break
                try:
                    entry = self._run_shard(shard)
                except EngineError as error:
                    # Without its trace, whose frames keep the broken engine in memory.
                    self._fault = self._fault or EngineError(str(error))
                    self._waiting.appendleft(shard)
                else:
                    self._done.put(entry)
        except BaseException as error:
            self._done.put(error)
        else:
            self._done.put(None)
