"""A task's connection to its executor's sidecar. A sidecar that dies is replaced, and no row is lost."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from dspark_batch import errors
from dspark_batch.errors import ConfigError, DSparkBatchError, EngineError, Problem
from dspark_batch.spark.client import Chunk, EngineSpec
from dspark_batch.spark.sidecar.launch import SidecarPlace, connect_or_start
from dspark_batch.spark.sidecar.protocol import (
    CHUNK,
    DONE,
    FAILED,
    HELLO,
    PROTOCOL_VERSION,
    READY,
    Channel,
    ConnectionLostError,
    Frame,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    chunk: Chunk
    future: Future[pa.Table]


class SidecarClient:
    """An ``EngineClient`` that speaks to a sidecar, and starts it where there is none.

    The constructor waits until the model is loaded. Raises ModelError or ConfigError when the sidecar says so, and
    EngineError when none can be reached.
    """

    def __init__(self, spec: EngineSpec, *, place: SidecarPlace, environment: Mapping[str, str]) -> None:
        self._spec = spec
        self._place = place
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._pending: dict[str, _Pending] = {}
        self._fault: Exception | None = None
        self._closed = False
        self._restarts_left = spec.settings.sidecar_restarts
        self._channel, self._ready = self._connect_persistently()
        threading.Thread(target=self._read, name="dspark-batch-sidecar", daemon=True).start()

    @property
    def max_concurrency(self) -> int:
        return int(self._ready.header["max_concurrency"])

    @property
    def pid(self) -> int:
        """Process id of the sidecar that serves now."""
        return int(self._ready.header["pid"])

    def submit(self, chunk: Chunk) -> Future[pa.Table]:
        """See ``EngineClient.submit``. Raises EngineError when the connection is given up."""
        future: Future[pa.Table] = Future()
        with self._lock:
            if self._fault is not None:
                raise self._fault
            assert not self._closed, "submit after close"
            key = str(next(self._numbers))
            self._pending[key] = _Pending(chunk, future)
            channel = self._channel
        _send_quietly(channel, key, chunk)
        return future

    def release(self, futures: Collection[Future[pa.Table]]) -> None:
        """See ``EngineClient.release``. The sidecar drops what has not begun when the connection ends."""
        for future in futures:
            future.cancel()

    def close(self) -> None:
        """End the connection; the sidecar stays."""
        with self._lock:
            self._closed = True
        self._channel.close()

    def _read(self) -> None:
        while True:
            try:
                self._receive(self._channel.receive())
            except ConnectionLostError as error:
                if self._closed or not self._replace(error):
                    return

    def _receive(self, frame: Frame) -> None:
        with self._lock:
            pending = self._pending.pop(frame.header["key"], None)
        if pending is None or not pending.future.set_running_or_notify_cancel():
            return
        if frame.kind == DONE:
            assert frame.table is not None, "a finished chunk has rows"
            pending.future.set_result(frame.table)
        else:
            pending.future.set_exception(_as_error(frame))

    def _replace(self, lost: ConnectionLostError) -> bool:
        """Connect to another sidecar and send again what is missing; False when that is given up."""
        logger.warning("the sidecar is gone (%s); its log ends: %s", lost, self._place.log_tail())
        try:
            self._use_restart(lost)
            channel, ready = self._connect_persistently()
        except Exception as error:
            self._give_up(error)
            return False
        with self._lock:
            self._channel.close()
            self._channel, self._ready = channel, ready
            again = list(self._pending.items())
        for key, pending in again:
            _send_quietly(channel, key, pending.chunk)
        return True

    def _connect_persistently(self) -> tuple[Channel, Frame]:
        while True:
            try:
                return self._connect()
            except ConnectionLostError as lost:
                self._use_restart(lost)

    def _connect(self) -> tuple[Channel, Frame]:
        channel = Channel(connect_or_start(self._spec, place=self._place, environment=self._environment))
        try:
            channel.send(Frame(kind=HELLO, header={"version": PROTOCOL_VERSION}))
            answer = channel.receive(timeout_s=self._spec.settings.load_timeout_s)
            if answer.kind == FAILED:
                raise _as_error(answer)
            if answer.kind != READY:
                raise ConnectionLostError(f"unexpected answer {answer.kind}")
        except TimeoutError:
            channel.close()
            raise EngineError(
                f"the sidecar did not load its model within {self._spec.settings.load_timeout_s:.0f} s "
                f"(spark.load_timeout_s); its log ends: {self._place.log_tail()}"
            ) from None
        except BaseException:
            channel.close()
            raise
        return channel, answer

    def _use_restart(self, lost: ConnectionLostError) -> None:
        if self._restarts_left == 0:
            raise EngineError(
                f"sidecars died {self.num_sidecars} times under this task (spark.sidecar_restarts); the last log "
                f"ends: {self._place.log_tail()}"
            ) from lost
        self._restarts_left -= 1

    @property
    def num_sidecars(self) -> int:
        """Sidecars that this task has seen."""
        return self._spec.settings.sidecar_restarts - self._restarts_left + 1

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            self._fault = error
            pending = list(self._pending.values())
            self._pending.clear()
        for entry in pending:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(error)


def _send_quietly(channel: Channel, key: str, chunk: Chunk) -> None:
    """A connection that is lost here is found lost by the reading thread too, which sends the chunk again."""
    header = {"key": key, "job": chunk.job.model_dump(mode="json")}
    with contextlib.suppress(ConnectionLostError):
        channel.send(Frame(kind=CHUNK, header=header, table=chunk.table))


def _as_error(frame: Frame) -> DSparkBatchError:
    message = str(frame.header["message"])
    kind = getattr(errors, str(frame.header["error"]), None)
    if kind is ConfigError:
        return ConfigError([Problem("config", message)])
    if isinstance(kind, type) and issubclass(kind, DSparkBatchError):
        return kind(message)
    return EngineError(message)
