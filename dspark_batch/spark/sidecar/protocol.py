"""Frames between Spark tasks and a sidecar: a JSON header, and rows as an Arrow stream."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 1 << 24
MAX_BODY_BYTES = 1 << 32

_LENGTHS = struct.Struct(">4sIQ")
_MAGIC = b"dsb1"

HELLO = "hello"
READY = "ready"
CHUNK = "chunk"
DONE = "done"
FAILED = "failed"


class ConnectionLostError(Exception):
    """The other side is gone, or speaks something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message. ``kind`` is one of the names above; ``header`` is JSON; ``table`` goes as an Arrow stream."""

    kind: str
    header: dict[str, Any]
    table: pa.Table | None = None


class Channel:
    """A stream socket that carries frames. Sending is thread-safe; receiving is for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Raises ConnectionLostError."""
        header = json.dumps({"kind": frame.kind, **frame.header}).encode()
        body = b"" if frame.table is None else _to_stream(frame.table)
        try:
            with self._sending:
                self._socket.sendall(_LENGTHS.pack(_MAGIC, len(header), len(body)) + header)
                self._socket.sendall(body)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error

    def receive(self, *, timeout_s: float | None = None) -> Frame:
        """The next frame. Raises ConnectionLostError at the end of the stream, and TimeoutError."""
        try:
            self._socket.settimeout(timeout_s)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        magic, header_bytes, body_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if magic != _MAGIC or header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
            raise ConnectionLostError("the other side does not speak this protocol")
        header = json.loads(self._read(header_bytes))
        body = self._read(body_bytes)
        table = pa.ipc.open_stream(pa.py_buffer(body)).read_all() if body else None
        return Frame(kind=header.pop("kind"), header=header, table=table)

    def close(self) -> None:
        """Ends both directions; a thread that receives wakes up with ConnectionLostError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        missing = memoryview(data)
        while missing:
            try:
                num_received = self._socket.recv_into(missing)
            except TimeoutError:
                raise
            except OSError as error:
                raise ConnectionLostError(str(error)) from error
            if num_received == 0:
                raise ConnectionLostError("the other side closed the connection")
            missing = missing[num_received:]
        return data


def _to_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
