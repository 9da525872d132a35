"""The sidecar: one engine per executor that outlives Python workers and serves all tasks in one continuous batch."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa

from dspark_batch.errors import ConfigError, DSparkBatchError, EngineError
from dspark_batch.job.config import JobConfig
from dspark_batch.spark.client import Chunk
from dspark_batch.spark.host import EngineHost
from dspark_batch.spark.sidecar.launch import SidecarSettings, is_alive
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

WATCH_INTERVAL_S = 1.0
GOODBYE_S = 2.0
"""How long a sidecar whose model did not load goes on telling clients why."""

logger = logging.getLogger(__name__)


class Presence:
    """Counts connections, and knows for how long there was none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_connected = 0
        self._left_s = clock()

    def enter(self) -> None:
        with self._lock:
            self._num_connected += 1

    def leave(self) -> None:
        with self._lock:
            self._num_connected -= 1
            self._left_s = self._clock()

    def idle_s(self) -> float:
        """Seconds since the last connection ended; 0 while there is one."""
        with self._lock:
            return 0.0 if self._num_connected else self._clock() - self._left_s


class SidecarServer:
    """Accepts connections at once and answers them when the engine is loaded."""

    def __init__(self, listener: socket.socket) -> None:
        self.presence = Presence()
        self._listener = listener
        self._host: Future[EngineHost] = Future()
        threading.Thread(target=self._accept, name="dspark-batch-accept", daemon=True).start()

    def load(self, make_host: Callable[[], EngineHost]) -> EngineHost:
        """Make the engine; clients that wait learn of it, or of the error, which is raised here too."""
        try:
            host = make_host()
        except Exception as error:
            self._host.set_exception(error)
            raise
        self._host.set_result(host)
        return host

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="dspark-batch-client", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self.presence.enter()
        channel = Channel(connection)
        try:
            _Conversation(channel, self._host).run()
        except ConnectionLostError:
            logger.info("a client left")
        except Exception:
            logger.exception("a client's connection ended")
        finally:
            channel.close()
            self.presence.leave()


class _Conversation:
    """One client. Results are sent by a thread of their own, so that the engine never waits for a socket."""

    def __init__(self, channel: Channel, host: Future[EngineHost]) -> None:
        self._channel = channel
        self._host = host
        self._outbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._open: set[Future[pa.Table]] = set()

    def run(self) -> None:
        hello = self._channel.receive()
        if hello.kind != HELLO or hello.header.get("version") != PROTOCOL_VERSION:
            raise ConnectionLostError(f"unexpected greeting {hello.kind} {hello.header}")
        try:
            host = self._host.result()
        except Exception as error:
            self._channel.send(_failure(error))
            return
        self._channel.send(Frame(kind=READY, header={"pid": os.getpid(), "max_concurrency": host.max_concurrency}))
        threading.Thread(target=self._send, name="dspark-batch-sender", daemon=True).start()
        try:
            while True:
                self._begin(host, self._channel.receive())
        finally:
            self._outbox.put(None)
            host.release(tuple(self._open))

    def _begin(self, host: EngineHost, frame: Frame) -> None:
        if frame.kind != CHUNK or frame.table is None:
            raise ConnectionLostError(f"unexpected frame {frame.kind}")
        key = frame.header["key"]
        try:
            future = host.submit(Chunk(job=JobConfig(**frame.header["job"]), table=frame.table))
        except ConfigError as error:
            self._outbox.put(_failure(error, key=key))
            return
        self._open.add(future)
        future.add_done_callback(lambda done: self._finish(key, done))

    def _finish(self, key: str, done: Future[pa.Table]) -> None:
        self._open.discard(done)
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._outbox.put(Frame(kind=DONE, header={"key": key}, table=done.result()))
        elif not isinstance(error, EngineError):
            self._outbox.put(_failure(error, key=key))

    def _send(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._channel.send(frame)
        except ConnectionLostError:
            self._channel.close()


def _failure(error: BaseException, *, key: str | None = None) -> Frame:
    kind = type(error).__name__ if isinstance(error, DSparkBatchError) else EngineError.__name__
    message = str(error) if isinstance(error, DSparkBatchError) else f"{type(error).__name__}: {error}"
    return Frame(kind=FAILED, header={"key": key, "error": kind, "message": message})


def serve(listener: socket.socket, settings: SidecarSettings) -> int:
    """Load the engine and serve until the executor is gone, the engine broke or nobody came for ``idle_s``.

    A broken engine ends the process without a word: its clients see the connection end and start another sidecar.
    """
    server = SidecarServer(listener)
    try:
        host = server.load(lambda: EngineHost(settings.config, factory=settings.factory))
    except Exception:
        logger.exception("the engine could not be loaded")
        _withdraw(settings)
        time.sleep(GOODBYE_S)
        return 1
    logger.info("serving %s on %s", settings.config.target, settings.socket_path)
    while not host.is_broken:
        if not is_alive(settings.owner_pid):
            logger.info("the executor's daemon %d is gone", settings.owner_pid)
            return 0
        if settings.idle_s is not None and server.presence.idle_s() > settings.idle_s:
            logger.info("no task for %.0f s", settings.idle_s)
            _withdraw(settings)
            return 0
        time.sleep(WATCH_INTERVAL_S)
    logger.error("the engine broke; this process ends and will be replaced")
    _withdraw(settings)
    return 1


def _withdraw(settings: SidecarSettings) -> None:
    Path(settings.socket_path).unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """``python -m dspark_batch.spark.sidecar.server FD``; settings come on the standard input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    for name in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    settings = SidecarSettings.from_json(sys.stdin.read())
    listener = socket.socket(fileno=int(arguments[0]))
    return serve(listener, settings)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    os._exit(status)
