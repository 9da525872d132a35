"""Small whole files in a folder of any pyarrow filesystem: written durably, with retries where a fault may pass."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pyarrow import fs

from dspark_batch.errors import OutputError, TransientStorageError
from dspark_batch.provenance import fsync_folder

NUM_ATTEMPTS = 4
NUM_READERS = 16
TRANSIENT_ERRNOS = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ESTALE}
)
TRANSIENT_WORDS = ("timeout", "timed out", "slow_down", "slowdown", "throttl", "503", "connection", "try again")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as a listing shows it. ``name`` is relative to the store, with forward slashes."""

    name: str
    size_bytes: int
    modified_s: float


class Store:
    """Files below one folder. Names are relative to it.

    Args:
        path: a local path or a URI that pyarrow knows (``s3://``, ``gs://``, ``hdfs://``, ``file://``).
        filesystem: use this one; ``path`` is then a path in it.
        backoff_s: wait before the first retry; doubled for each one after that.

    Every method raises OutputError with the path and the reason; TransientStorageError where the fault usually
    passes but did not within a few tries.
    """

    def __init__(self, path: str, *, filesystem: fs.FileSystem | None = None, backoff_s: float = 0.2) -> None:
        self.filesystem, self.root = open_filesystem(path, filesystem=filesystem)
        self._backoff_s = backoff_s
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def make_root(self) -> None:
        """Make the folder itself where it is missing; remote stores need none."""
        if not self.is_local:
            return
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output.path: the folder {self.root} cannot be made: {error}") from error

    def write(self, name: str, data: bytes, *, staging: str) -> None:
        """Write the file so that it is whole or absent under ``name``: staged under another name, fsynced, renamed.

        Nothing stays under the other name where that fails.
        """

        def stage_and_move() -> None:
            try:
                self._write(staging, data)
                self._move(staging, name)
            except OSError:
                # A disk that is full is not made fuller.
                with suppress(OSError):
                    self.filesystem.delete_file(self._path(staging))
                raise

        try:
            self._try(stage_and_move, doing="write", name=name)
        except FileNotFoundError as error:
            raise OutputError(f"cannot write {self._path(name)}: {error}; did another run remove it?") from error

    def read(self, name: str) -> bytes | None:
        """The file's content, or None where there is no such file."""
        try:
            return self._try(lambda: self._read(name), doing="read", name=name)
        except FileNotFoundError:
            return None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The content of many small files, those that do not exist left out; several at a time on remote stores."""
        if self.is_local or len(names) < 2:
            found = [(name, self.read(name)) for name in names]
        else:
            with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="dspark-batch-read") as pool:
                found = list(zip(names, pool.map(self.read, names), strict=True))
        return {name: data for name, data in found if data is not None}

    def create(self, name: str, data: bytes, *, staging: str) -> bool:
        """Write a file unless there is one of that name; whether it was written.

        Atomic on a local disk. Elsewhere two callers at the same moment may both succeed, and the later write stands.
        """
        if not self.is_local:
            if self.stat(name) is not None:
                return False
            self.write(name, data, staging=staging)
            return True

        def stage_and_link() -> bool:
            self._write(staging, data)
            try:
                return self._link(staging, name)
            finally:
                Path(self._path(staging)).unlink(missing_ok=True)

        return self._try(stage_and_link, doing="create", name=name)

    def move(self, source: str, target: str) -> bool:
        """Rename a file over another; False where there is no source. On object stores a copy and then a deletion."""
        try:
            self._try(lambda: self._move(source, target), doing="move", name=source)
        except FileNotFoundError:
            return False
        return True

    def stat(self, name: str) -> StoredFile | None:
        """Size and modification time, or None where there is no such file."""
        info = self._try(lambda: self.filesystem.get_file_info(self._path(name)), doing="look at", name=name)
        if info.type != fs.FileType.File:
            return None
        return StoredFile(name=name, size_bytes=info.size, modified_s=(info.mtime_ns or 0) / 1e9)

    @contextmanager
    def lock(self, name: str, *, shared: bool) -> Iterator[None]:
        """Hold a lock file, against other processes of any machine that locks on this disk; remote stores have none."""
        if not self.is_local:
            yield
            return
        try:
            file = self._try(lambda: self._lock(name, shared=shared), doing="lock", name=name)
        except FileNotFoundError as error:
            raise OutputError(f"cannot lock {self._path(name)}: {error}; did another run remove it?") from error
        with file:
            yield

    def files(self, folder: str = "", *, recursive: bool = False) -> dict[str, StoredFile]:
        """The files of a folder by name; none where the folder does not exist."""
        return self._try(lambda: self._files(folder, recursive=recursive), doing="list", name=folder or ".")

    def delete(self, name: str) -> None:
        """Remove a file. A file that is not there is fine."""
        try:
            self._try(lambda: self._delete(name), doing="delete", name=name)
        except FileNotFoundError:
            return

    def _write(self, name: str, data: bytes) -> None:
        if self.is_local:
            target = Path(self._path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_durably(target, data)
            return
        self.filesystem.create_dir(self._path(name).rpartition("/")[0], recursive=True)
        with self.filesystem.open_output_stream(self._path(name)) as stream:
            stream.write(data)

    def _move(self, source: str, target: str) -> None:
        if self.is_local:
            path = Path(self._path(target))
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(self._path(source)).replace(path)
            fsync_folder(path.parent)
            return
        self.filesystem.create_dir(self._path(target).rpartition("/")[0], recursive=True)
        self.filesystem.move(self._path(source), self._path(target))

    def _link(self, source: str, target: str) -> bool:
        path = Path(self._path(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self._path(source), path)
        except FileExistsError:
            return False
        fsync_folder(path.parent)
        return True

    def _lock(self, name: str, *, shared: bool) -> IO[str]:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError:
            file.close()
            raise
        return file

    def _read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def _delete(self, name: str) -> None:
        self.filesystem.delete_file(self._path(name))

    def _files(self, folder: str, *, recursive: bool) -> dict[str, StoredFile]:
        selector = fs.FileSelector(self._path(folder), recursive=recursive, allow_not_found=True)
        found: dict[str, StoredFile] = {}
        for info in self.filesystem.get_file_info(selector):
            if info.type != fs.FileType.File:
                continue
            name = info.path.removeprefix(self.root).lstrip("/")
            modified_s = (info.mtime_ns or 0) / 1e9
            found[name] = StoredFile(name=name, size_bytes=info.size, modified_s=modified_s)
        return found

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _try(self, action: Callable[[], _T], *, doing: str, name: str) -> _T:
        for attempt in range(NUM_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if not is_transient(error):
                    raise OutputError(f"cannot {doing} {self._path(name)}: {error}") from error
                if attempt == NUM_ATTEMPTS - 1:
                    raise TransientStorageError(
                        f"cannot {doing} {self._path(name)} after {NUM_ATTEMPTS} tries: {error}"
                    ) from error
                time.sleep(self._backoff_s * 2**attempt)
        raise AssertionError("unreachable")


def open_filesystem(path: str, *, filesystem: fs.FileSystem | None = None) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or URI, and the path in it without a trailing slash. Raises OutputError."""
    if filesystem is not None:
        return filesystem, path.rstrip("/")
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).expanduser().resolve())
    try:
        found, inner = fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"no filesystem for {path!r}: {error}") from error
    return found, inner.rstrip("/")


def is_transient(error: OSError) -> bool:
    """Whether a storage fault usually passes: time-outs, throttling, lost connections."""
    if isinstance(error, TimeoutError | ConnectionError | InterruptedError) or error.errno in TRANSIENT_ERRNOS:
        return True
    return error.errno is None and any(word in str(error).lower() for word in TRANSIENT_WORDS)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
