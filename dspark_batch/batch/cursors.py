"""One pass over a file of record batches, from which shards in order are cut without reading anything twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

READ_BATCH_ROWS = 2048
FILE_MAGIC = b"ARROW1"


def arrow_batches(stream: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of an Arrow file, whether of the random-access format (Feather) or a stream."""
    magic = stream.read(len(FILE_MAGIC))
    stream.seek(0)
    if magic != FILE_MAGIC:
        reader = pa.ipc.open_stream(stream)
        return reader.schema, iter(reader)
    file = pa.ipc.open_file(stream)
    return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))


class Cursor:
    """Goes forward through the rows of one file. ``bounds`` are the rows at which reading can begin without waste."""

    def __init__(
        self, path: str, stream: pa.NativeFile, batches: Iterator[pa.RecordBatch], *, position: int, bounds: Any
    ) -> None:
        self.path = path
        self._stream = stream
        self._batches = batches
        self._position = position
        self._bounds = bounds
        self._pending: pa.RecordBatch | None = None

    def can_read(self, path: str, row_start: int) -> bool:
        """Whether going on from here is right and skips no whole row group."""
        if path != self.path or row_start < self._position:
            return False
        return row_start == self._position or self._group(row_start) == self._group(self._position)

    def take(self, start: int, stop: int, *, empty: pa.Schema) -> pa.Table:
        """Rows ``start`` to ``stop`` of the file; fewer where it ends before. ``empty`` is the schema of no rows."""
        parts: list[pa.RecordBatch] = []
        while self._position < stop:
            batch = self._pending if self._pending is not None else next(self._batches, None)
            if batch is None:
                break
            end = min(stop - self._position, batch.num_rows)
            begin = min(max(start - self._position, 0), end)
            if end > begin:
                parts.append(batch.slice(begin, end - begin))
            self._pending = batch.slice(end) if end < batch.num_rows else None
            self._position += end
        return pa.Table.from_batches(parts) if parts else empty.empty_table()

    def close(self) -> None:
        self._stream.close()

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1


def parquet_cursor(filesystem: fs.FileSystem, path: str, *, row_start: int, names: list[str]) -> Cursor:
    """A cursor from the row group that holds ``row_start``, over those of the columns that the file has."""
    stream = filesystem.open_input_file(path)
    file = pq.ParquetFile(stream)
    rows = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    bounds = np.concatenate([[0], np.cumsum(rows)])
    first = int(np.searchsorted(bounds, row_start, side="right")) - 1
    present = [name for name in names if name in file.schema_arrow.names]
    batches = file.iter_batches(batch_size=READ_BATCH_ROWS, row_groups=list(range(first, len(rows))), columns=present)
    return Cursor(path, stream, batches, position=int(bounds[first]), bounds=bounds)


def arrow_cursor(filesystem: fs.FileSystem, path: str, *, names: list[str]) -> Cursor:
    """A cursor from the first row. Local files are mapped, so that rows which are passed over are not read."""
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    stream = pa.memory_map(path) if is_local else filesystem.open_input_file(path)
    schema, batches = arrow_batches(stream)
    present = [name for name in names if name in schema.names]
    return Cursor(path, stream, (batch.select(present) for batch in batches), position=0, bounds=np.zeros(1))
