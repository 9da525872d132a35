"""Reads shards: the columns that a run needs, its filter, and the identity of every row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dspark_batch.batch.filters import parse_filter
from dspark_batch.batch.jsonl import parse_lines
from dspark_batch.batch.prompts import prompt_columns
from dspark_batch.batch.rows import ShardInput, row_ids
from dspark_batch.batch.schema import missing_columns
from dspark_batch.batch.shards import Shard
from dspark_batch.batch.sources import open_input_filesystem
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.job.config import JobConfig

READ_BATCH_ROWS = 2048
ROW_INDEX = "__dspark_row_index"


def columns_to_read(config: JobConfig, *, schema: pa.Schema) -> pa.Schema:
    """The part of the input schema that a run reads: carried columns, and those of id, prompt and filter.

    Raises ConfigError naming every column that the input lacks, or what is wrong with the filter.
    """
    carried = schema.names if config.input.columns is None else config.input.columns
    wanted = {
        "input.columns": carried,
        "input.id": [] if config.input.id is None else [config.input.id],
        "prompt": prompt_columns(config.prompt),
    }
    problems = [p for field, names in wanted.items() for p in missing_columns(field, names, schema=schema)]
    used = {name for names in wanted.values() for name in names}
    if config.input.filter is not None:
        try:
            used.update(parse_filter(config.input.filter, schema=schema)[1])
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return pa.schema([field for field in schema if field.name in used])


class ShardReader:
    """Reads shards of one run. Shards of a file that are read in order share one pass over it. Thread-safe.

    ``schema`` is what every table it reads has; a ``BatchWorker`` takes it as its input schema.
    """

    def __init__(self, config: JobConfig, *, plan_schema: pa.Schema, filesystem: fs.FileSystem | None = None) -> None:
        self.schema = columns_to_read(config, schema=plan_schema)
        self._id_column = config.input.id
        self._filter = None
        if config.input.filter is not None:
            self._filter, _ = parse_filter(config.input.filter, schema=plan_schema)
        self._fs = filesystem if filesystem is not None else open_input_filesystem(config.input)
        self._cursor: _ParquetCursor | None = None
        self._lock = threading.Lock()

    def read(self, shard: Shard) -> ShardInput:
        """The rows of a shard that pass the filter, with their ids. Raises InputError naming file and reason."""
        try:
            with self._lock:
                table = self._read_jsonl(shard) if shard.format == "jsonl" else self._read_parquet(shard)
        except (OSError, pa.ArrowException) as error:
            self._cursor = None
            raise InputError(f"{shard.path}: cannot be read: {error}") from error
        if table.num_rows != shard.num_rows:
            raise InputError(
                f"{shard.path}: {table.num_rows} rows from row {shard.row_start}, the plan has {shard.num_rows}; "
                "the file changed during the run"
            )
        index = np.arange(shard.row_start, shard.row_start + shard.num_rows, dtype=np.int64)
        if self._filter is not None:
            kept = table.append_column(ROW_INDEX, pa.array(index)).filter(self._filter)
            index = kept.column(ROW_INDEX).to_numpy()
            table = kept.drop_columns([ROW_INDEX])
        ids = row_ids(table, id_column=self._id_column, relative_file=shard.relative, row_index=index.tolist())
        return ShardInput(key=shard.name, table=table, ids=ids)

    def close(self) -> None:
        """Close the file that is open, if any."""
        with self._lock:
            if self._cursor is not None:
                self._cursor.close()
            self._cursor = None

    def _read_jsonl(self, shard: Shard) -> pa.Table:
        assert shard.byte_start is not None
        assert shard.byte_stop is not None
        with self._fs.open_input_file(shard.path) as file:
            file.seek(shard.byte_start)
            data = bytes(file.read(shard.byte_stop - shard.byte_start))
        table = parse_lines(data, schema=self.schema, file=shard.path, row_start=shard.row_start)
        return table.select(self.schema.names)

    def _read_parquet(self, shard: Shard) -> pa.Table:
        if self._cursor is None or not self._cursor.can_read(shard):
            if self._cursor is not None:
                self._cursor.close()
            self._cursor = _ParquetCursor(self._fs, shard, schema=self.schema)
        return self._cursor.take(shard.row_start, shard.row_start + shard.num_rows)


class _ParquetCursor:
    """One pass over a Parquet file, from the row group of a shard onward."""

    def __init__(self, filesystem: fs.FileSystem, shard: Shard, *, schema: pa.Schema) -> None:
        self.path = shard.path
        self._stream = filesystem.open_input_file(shard.path)
        self._file = pq.ParquetFile(self._stream)
        self._schema = schema
        metadata = self._file.metadata
        rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._bounds = np.concatenate([[0], np.cumsum(rows)])
        first = self._group(shard.row_start)
        self._position = int(self._bounds[first])
        present = [name for name in schema.names if name in self._file.schema_arrow.names]
        self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=READ_BATCH_ROWS, row_groups=list(range(first, len(rows))), columns=present
        )
        self._pending: pa.RecordBatch | None = None

    def can_read(self, shard: Shard) -> bool:
        """Whether going on from here is right and skips no whole row group."""
        if shard.path != self.path or shard.row_start < self._position:
            return False
        return shard.row_start == self._position or self._group(shard.row_start) == self._group(self._position)

    def take(self, start: int, stop: int) -> pa.Table:
        """Rows ``start`` to ``stop`` of the file; fewer where it ends before."""
        parts: list[pa.RecordBatch] = []
        while self._position < stop:
            batch = self._pending if self._pending is not None else next(self._batches, None)
            if batch is None:
                break
            end = min(stop - self._position, batch.num_rows)
            begin = min(max(start - self._position, 0), end)
            parts.append(batch.slice(begin, end - begin))
            self._pending = batch.slice(end) if end < batch.num_rows else None
            self._position += end
        num_rows = sum(part.num_rows for part in parts)
        table = pa.Table.from_batches(parts) if parts else self._schema.empty_table()
        columns = [self._column(table, field, num_rows=num_rows) for field in self._schema]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def close(self) -> None:
        self._stream.close()

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._bounds, row, side="right")) - 1

    def _column(self, table: pa.Table, field: pa.Field[Any], *, num_rows: int) -> Any:
        if field.name not in table.column_names:
            return pa.nulls(num_rows, type=field.type)
        column = table.column(field.name)
        return column if column.type.equals(field.type) else column.cast(field.type)
