"""Finds the sidecar of an executor, or starts it under a file lock, on a socket that listens at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.spark.client import EngineSpec

MAX_SOCKET_PATH_BYTES = 100
"""A Unix socket's path must fit in 108 bytes on Linux and 104 elsewhere, its end mark included."""

LOG_TAIL_BYTES = 4000
BACKLOG = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarSettings:
    """What a sidecar reads from its standard input, as JSON. owner_pid: it ends when this process has ended."""

    config: EngineConfig
    factory: str | None
    idle_s: float | None
    socket_path: str
    owner_pid: int

    @classmethod
    def of(cls, spec: EngineSpec, *, place: SidecarPlace) -> SidecarSettings:
        return cls(
            config=spec.config,
            factory=spec.factory,
            idle_s=spec.settings.sidecar_idle_s,
            socket_path=str(place.socket_path),
            owner_pid=_owner_pid(),
        )

    @classmethod
    def from_json(cls, text: str) -> SidecarSettings:
        values = json.loads(text)
        return cls(**{**values, "config": EngineConfig(**values["config"])})

    def to_json(self) -> str:
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json"),
                "factory": self.factory,
                "idle_s": self.idle_s,
                "socket_path": self.socket_path,
                "owner_pid": self.owner_pid,
            }
        )


@dataclass(frozen=True, slots=True)
class SidecarPlace:
    """Where one sidecar's socket, lock, settings and log lie. The folder is readable by this user alone."""

    folder: Path
    name: str

    @classmethod
    def of(cls, executor_dir: Path, *parts: str) -> SidecarPlace:
        """The place for an executor and whatever else tells its sidecars apart.

        In the executor's own folder, which Spark removes; where that makes the socket's path too long, in the
        temporary folder under a name made from it.
        """
        name = hashlib.sha256("\x1f".join((str(executor_dir), *parts)).encode()).hexdigest()[:16]
        inside = executor_dir / "dspark"
        if len(os.fsencode(inside / f"{name}.sock")) <= MAX_SOCKET_PATH_BYTES:
            return cls(inside, name)
        return cls(Path(tempfile.gettempdir()) / f"dspark-{os.getuid()}", name)

    @property
    def socket_path(self) -> Path:
        return self.folder / f"{self.name}.sock"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the place's lock against other processes; the system releases it when the holder dies."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise EngineError(f"{self.folder} belongs to another user; remove it or set another SPARK_LOCAL_DIRS")
        with (self.folder / f"{self.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def log_tail(self) -> str:
        """The end of the log of the sidecar that ran here last."""
        try:
            data = self.log_path.read_bytes()
        except OSError:
            return "no log"
        return data[-LOG_TAIL_BYTES:].decode(errors="replace").strip() or "empty log"


def connect_or_start(spec: EngineSpec, *, place: SidecarPlace, environment: Mapping[str, str]) -> socket.socket:
    """A connection to the place's sidecar; started where none listens. Raises EngineError when it cannot start.

    The socket is bound here and inherited, so a connection made at once waits until the model is loaded.
    """
    connection = _connect(place)
    if connection is not None:
        return connection
    with place.locked():
        connection = _connect(place)
        if connection is None:
            _start(spec, place=place, environment=environment)
            connection = _connect(place)
    if connection is None:
        raise EngineError(f"the sidecar ended before it took a connection; its log ends: {place.log_tail()}")
    return connection


def _owner_pid() -> int:
    """The leader of this process group, which is Spark's Python daemon; this process where the leader has ended."""
    leader = os.getpgrp()
    return leader if is_alive(leader) else os.getpid()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _connect(place: SidecarPlace) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(place.socket_path))
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def _start(spec: EngineSpec, *, place: SidecarPlace, environment: Mapping[str, str]) -> None:
    """The sidecar stays in the process group of Spark's Python daemon, which ends it with the executor."""
    place.socket_path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, place.log_path.open("ab") as log:
        listener.bind(str(place.socket_path))
        place.socket_path.chmod(0o600)
        listener.listen(BACKLOG)
        command = [sys.executable, "-m", "dspark_batch.spark.sidecar.server", str(listener.fileno())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        )
        assert process.stdin is not None
        try:
            process.stdin.write(SidecarSettings.of(spec, place=place).to_json().encode())
            process.stdin.close()
        except BrokenPipeError:
            raise EngineError(f"the sidecar did not start; its log ends: {place.log_tail()}") from None
        finally:
            threading.Thread(target=process.wait, name="dspark-batch-reaper", daemon=True).start()
