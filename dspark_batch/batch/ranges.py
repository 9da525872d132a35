"""Byte ranges of text files. Those of a compressed file, which is one stream, are ranges of what it holds."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import fs

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
SKIP_BYTES = 8 * 2**20


def open_text(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """The content of a text file from its beginning, decompressed by the end of its name."""
    return filesystem.open_input_stream(path, compression=_compression(path))


def field_delimiter(path: str, *, default: str) -> str:
    """A tab for ``.tsv`` files, also compressed ones, and ``default`` for all others."""
    name = path.lower()
    return "\t" if name.removesuffix(_suffix(name) or "").endswith(".tsv") else default


class RangeReader:
    """Reads byte ranges. Those of a compressed file that are read in order share one pass over it."""

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self._fs = filesystem
        self._path = ""
        self._stream: pa.NativeFile | None = None
        self._place = 0

    def read(self, path: str, start: int, stop: int) -> bytes:
        """The bytes, fewer where the file ends before. Raises what pyarrow raises."""
        if _compression(path) is None:
            with self._fs.open_input_file(path) as file:
                file.seek(start)
                return bytes(file.read(stop - start))
        if self._stream is None or path != self._path or start < self._place:
            self.close()
            self._stream, self._path, self._place = open_text(self._fs, path), path, 0
        while self._place < start and self._take(min(start - self._place, SKIP_BYTES)):
            pass
        return self._take(stop - start)

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _take(self, num_bytes: int) -> bytes:
        assert self._stream is not None
        data = bytes(self._stream.read(num_bytes))
        self._place += len(data)
        return data


def _compression(path: str) -> str | None:
    suffix = _suffix(path.lower())
    return None if suffix is None else COMPRESSIONS[suffix]


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), None)
