"""One pass over a file of record batches, from which shards in order are cut without reading anything twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

READ_BATCH_ROWS = 2048
FILE_MAGIC = b"ARROW1"
END = 2**62
"""A row beyond every file."""

Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """A row group of a Parquet file: its number, and its rows in the file."""

    index: int
    row_start: int
    row_stop: int


def all_row_groups(metadata: Any) -> tuple[RowGroup, ...]:
    """The row groups of a Parquet file, from its footer."""
    groups: list[RowGroup] = []
    start = 0
    for index in range(metadata.num_row_groups):
        stop = start + metadata.row_group(index).num_rows
        groups.append(RowGroup(index=index, row_start=start, row_stop=stop))
        start = stop
    return tuple(groups)


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
    """Goes forward through the rows of one file, those of ``groups`` alone: (start, stop) of each, in rows of the file.

    Reading can begin without waste at the start of a group. Rows past the last group count as there, so that a file
    that has become shorter than its plan is noticed.
    """

    def __init__(
        self,
        path: str,
        stream: pa.NativeFile,
        batches: Iterator[pa.RecordBatch],
        *,
        groups: Sequence[tuple[int, int]],
        num_rows: int,
        row_start: int = 0,
    ) -> None:
        spans = np.array([*groups, (num_rows, END)], dtype=np.int64)
        self.path = path
        self._stream = stream
        self._batches = batches
        self._starts, self._stops = spans[:, 0], spans[:, 1]
        self._offsets = np.concatenate([[0], np.cumsum(self._stops - self._starts)])
        self._offset = int(self._offsets[self._first_group(row_start)])
        self._pending: pa.RecordBatch | None = None

    def can_read(self, path: str, row_start: int) -> bool:
        """Whether going on from here is right and skips no whole row group."""
        if path != self.path:
            return False
        offset = self._offset_of(row_start)
        return offset == self._offset or (offset > self._offset and self._group(offset) == self._group(self._offset))

    def take(self, start: int, stop: int, *, empty: pa.Schema) -> tuple[pa.Table, Index]:
        """Those of the rows ``start`` to ``stop`` of the file that are read, and their places.

        The table has fewer rows than places where the file ends before. ``empty`` is the schema of no rows.
        """
        parts: list[pa.RecordBatch] = []
        first, last = self._offset_of(start), self._offset_of(stop)
        while self._offset < last:
            batch = self._pending if self._pending is not None else next(self._batches, None)
            if batch is None:
                break
            end = min(last - self._offset, batch.num_rows)
            begin = min(max(first - self._offset, 0), end)
            if end > begin:
                parts.append(batch.slice(begin, end - begin))
            self._pending = batch.slice(end) if end < batch.num_rows else None
            self._offset += end
        return pa.Table.from_batches(parts) if parts else empty.empty_table(), self._places(start, stop)

    def close(self) -> None:
        self._stream.close()

    def _places(self, start: int, stop: int) -> Index:
        begins, ends = np.maximum(self._starts, start), np.minimum(self._stops, stop)
        inside = np.flatnonzero(begins < ends)
        parts = [np.arange(begins[place], ends[place], dtype=np.int64) for place in inside]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _first_group(self, row: int) -> int:
        """The first group that ends after ``row``."""
        return int(np.searchsorted(self._stops, row, side="right"))

    def _offset_of(self, row: int) -> int:
        """How many rows are read before ``row`` of the file."""
        group = self._first_group(row)
        return int(self._offsets[group]) + max(0, row - int(self._starts[group]))

    def _group(self, offset: int) -> int:
        return int(np.searchsorted(self._offsets, offset, side="right")) - 1


def parquet_cursor(
    filesystem: fs.FileSystem,
    path: str,
    *,
    row_start: int,
    names: list[str],
    row_groups: Sequence[RowGroup] | None = None,
) -> Cursor:
    """A cursor from the row group that holds ``row_start``, over those of the columns that the file has.

    ``row_groups`` are those to read; None for all.
    """
    stream = filesystem.open_input_file(path)
    file = pq.ParquetFile(stream)
    groups = all_row_groups(file.metadata) if row_groups is None else row_groups
    ahead = [group.index for group in groups if group.row_stop > row_start]
    present = [name for name in names if name in file.schema_arrow.names]
    batches = file.iter_batches(batch_size=READ_BATCH_ROWS, row_groups=ahead, columns=present) if ahead else iter(())
    return Cursor(
        path,
        stream,
        batches,
        groups=[(group.row_start, group.row_stop) for group in groups],
        num_rows=file.metadata.num_rows,
        row_start=row_start,
    )


def arrow_cursor(filesystem: fs.FileSystem, path: str, *, names: list[str]) -> Cursor:
    """A cursor from the first row. Local files are mapped, so that rows which are passed over are not read."""
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    stream = pa.memory_map(path) if is_local else filesystem.open_input_file(path)
    schema, batches = arrow_batches(stream)
    present = [name for name in names if name in schema.names]
    return Cursor(path, stream, (batch.select(present) for batch in batches), groups=[], num_rows=0)
