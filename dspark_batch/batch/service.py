"""A worker on its own thread, for drivers whose calls come from several threads or an event loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Protocol

from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.rows import ShardInput
from dspark_batch.errors import EngineError

_Job = tuple[ShardInput, "Future[ShardResult]"]


class ShardWorker(Protocol):
    """What the service drives, on its thread alone: a ``BatchWorker``, or several of them on one engine."""

    @property
    def num_open_shards(self) -> int: ...

    def open(self, shard: ShardInput) -> None: ...

    def advance(self) -> None: ...

    def take_finished(self) -> list[ShardResult]: ...


class WorkerService:
    """One engine thread with an inbox. Rows of all submitted shards decode in one continuous batch.

    ``make_worker`` runs on the engine thread, so that everything that belongs to the engine lives there; ``start``
    waits for it. How many shards are in flight is the caller's choice: two keep the engine from draining between
    shards. Use as a context manager, or call ``close``.
    """

    def __init__(self, make_worker: Callable[[], ShardWorker]) -> None:
        self._make_worker = make_worker
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ready: Future[ShardWorker] = Future()
        self._lock = threading.Lock()
        self._closed = False
        self._abandoned = False
        self._doing: str | None = None
        self._fault: EngineError | None = None
        self._futures: dict[str, Future[ShardResult]] = {}
        self._thread = threading.Thread(target=self._run, name="dspark-batch-engine", daemon=True)

    def start(self) -> WorkerService:
        """Start the thread and wait until the worker is made. Raises what ``make_worker`` raised."""
        self._thread.start()
        self._ready.result()
        return self

    @property
    def fault(self) -> EngineError | None:
        """Why the engine broke, or None. A broken service takes no more shards; its process should end."""
        return self._fault

    @property
    def thread(self) -> threading.Thread:
        return self._thread

    @property
    def doing(self) -> str | None:
        """What the engine thread does now, for messages; None while it waits for work."""
        return self._doing

    def submit(self, shard: ShardInput) -> Future[ShardResult]:
        """Queue a shard. Thread-safe.

        The future raises EngineError when the engine breaks (retriable in another process) and CancelledError when the
        service closes first. Raises EngineError right away when the engine is broken, RuntimeError after ``close``.
        """
        future: Future[ShardResult] = Future()
        with self._lock:
            if self._fault is not None:
                raise self._fault
            if self._closed:
                raise RuntimeError(f"shard {shard.key}: the worker service is closed")
            self._inbox.put((shard, future))
        return future

    def abandon(self, fault: EngineError) -> None:
        """Give up an engine thread that hangs: open futures end with the fault, and ``close`` does not wait for it.

        The thread goes on if it ever can, and then ends. Thread-safe.
        """
        self._abandoned = True
        self._fail(fault)

    @property
    def is_abandoned(self) -> bool:
        return self._abandoned

    def close(self) -> None:
        """Stop after the current round. Shards in flight are cancelled. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if self._thread.is_alive() and not self._abandoned:
            self._thread.join()

    def __enter__(self) -> WorkerService:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            worker = self._make_worker()
        except BaseException as error:
            self._fail(None)
            self._ready.set_exception(error)
            return
        self._ready.set_result(worker)
        try:
            while not self._abandoned and self._accept(worker):
                self._doing = "a decoding round"
                worker.advance()
                for result in worker.take_finished():
                    self._deliver(result)
        except EngineError as error:
            self._fail(error)
        except Exception as error:
            fault = EngineError(f"the engine thread ended: {type(error).__name__}: {error}")
            fault.__cause__ = error
            self._fail(fault)
        else:
            self._fail(None)

    def _deliver(self, result: ShardResult) -> None:
        with self._lock:
            future = self._futures.pop(result.key, None)
        if future is not None:
            future.set_result(result)

    def _accept(self, worker: ShardWorker) -> bool:
        """Open every shard in the inbox, waiting where there is nothing else to do. False when the service closes."""
        while True:
            if worker.num_open_shards == 0:
                self._doing = None
            try:
                job = self._inbox.get(block=worker.num_open_shards == 0)
            except queue.Empty:
                return True
            if job is None:
                return False
            shard, future = job
            if not future.set_running_or_notify_cancel():
                continue
            if shard.key in self._futures:
                future.set_exception(ValueError(f"shard {shard.key} was submitted while it is in flight"))
                continue
            with self._lock:
                fault = self._fault
                if fault is None:
                    self._futures[shard.key] = future
            if fault is not None:
                future.set_exception(fault)
                return False
            self._doing = f"taking in shard {shard.key}"
            worker.open(shard)

    def _fail(self, fault: EngineError | None) -> None:
        """End every future that is still open: with the fault, or cancelled where there is none."""
        with self._lock:
            self._fault = self._fault or fault
            self._closed = True
            pending = list(self._futures.values())
            self._futures.clear()
            while not self._inbox.empty():
                job = self._inbox.get()
                if job is not None and job[1].set_running_or_notify_cancel():
                    pending.append(job[1])
        self._doing = None
        for future in pending:
            future.set_exception(fault if fault is not None else CancelledError())
