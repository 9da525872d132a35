"""Reads shards: the columns that a run needs, its filter, and the identity of every row."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from dspark_batch.batch.cursors import Cursor, Index, arrow_cursor, parquet_cursor
from dspark_batch.batch.delimited import parse_records
from dspark_batch.batch.filters import parse_filter
from dspark_batch.batch.hive import add_constants
from dspark_batch.batch.jsonl import parse_lines
from dspark_batch.batch.prompts import prompt_columns
from dspark_batch.batch.pruning import Pruner
from dspark_batch.batch.ranges import RangeReader, field_delimiter
from dspark_batch.batch.rows import ShardInput, row_ids
from dspark_batch.batch.schema import missing_columns
from dspark_batch.batch.shards import Identity, Shard, facts
from dspark_batch.batch.sources import open_input_filesystem
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.job.config import JobConfig

ROW_INDEX = "__dspark_row_index"
NS_PER_S = 1_000_000_000


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

    ``schema`` is what every table it reads has; a ``BatchWorker`` takes it as its input schema. ``columns`` replaces
    the columns that the run needs, for callers that look at others.
    """

    def __init__(
        self,
        config: JobConfig,
        *,
        plan_schema: pa.Schema,
        filesystem: fs.FileSystem | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.schema = columns_to_read(config, schema=plan_schema)
        if columns is not None:
            self.schema = pa.schema([field for field in plan_schema if field.name in columns])
        self._id_column = config.input.id
        self._is_by_rows = config.input.incremental == "rows"
        self._delimiter = config.input.delimiter
        self._filter = None
        if config.input.filter is not None:
            self._filter, _ = parse_filter(config.input.filter, schema=plan_schema)
        self._pruner = Pruner(config.input.filter, schema=plan_schema)
        self._fs = filesystem if filesystem is not None else open_input_filesystem(config.input)
        self._cursor: Cursor | None = None
        self._ranges = RangeReader(self._fs)
        self._lock = threading.Lock()

    def read(self, shard: Shard) -> ShardInput:
        """The rows of a shard that are to be done and pass the filter, with their ids.

        Raises InputError naming file and reason, also where the file is not the one that was planned.
        """
        table, index = self.read_rows(shard)
        ids = row_ids(table, id_column=self._id_column, relative_file=shard.relative, row_index=index)
        return ShardInput(key=shard.name, table=table, ids=ids)

    def read_rows(self, shard: Shard) -> tuple[pa.Table, list[int]]:
        """As ``read``: the rows, and their places in the file."""
        try:
            with self._lock:
                try:
                    table, index = self._read(shard)
                finally:
                    # Not before, so that a file that is replaced while it is read is noticed too.
                    self._refuse_changed(shard)
        except (OSError, pa.ArrowException) as error:
            self._drop_cursor()
            raise InputError(f"{shard.path}: cannot be read: {error}") from error
        if table.num_rows != len(index):
            raise InputError(
                f"{shard.path}: {table.num_rows} rows from row {shard.row_start}, the plan has {len(index)}; "
                "the file changed during the run"
            )
        if shard.keep is None and self._filter is None:
            return table, index.tolist()
        table = table.append_column(ROW_INDEX, pa.array(index))
        if shard.keep is not None:
            keep = unpack_bits(shard.keep, num_rows=shard.row_stop - shard.row_start)
            table = table.filter(pa.array(keep[index - shard.row_start]))
        if self._filter is not None:
            table = table.filter(self._filter)
        kept = table.column(ROW_INDEX).to_numpy().tolist()
        return table.drop_columns([ROW_INDEX]), kept

    def close(self) -> None:
        """Close the file that is open, if any."""
        with self._lock:
            self._drop_cursor()

    def _refuse_changed(self, shard: Shard) -> None:
        if shard.identity is None:
            return
        info = self._fs.get_file_info(shard.path)
        if self._is_planned(info, shard.identity):
            return
        now = "gone" if info.type != fs.FileType.File else facts((info.size, info.mtime_ns))
        way_out = (
            "run the job without --retry-failed: it takes the rows that are not done as they are now"
            if self._is_by_rows
            else "begin a new run (another output.path, or output.mode=overwrite)"
        )
        raise InputError(
            f"{shard.path} is not the file that this run planned ({facts(shard.identity)} then, {now} now); "
            f"restore it, or {way_out}"
        )

    def _is_planned(self, info: fs.FileInfo, identity: Identity) -> bool:
        size_bytes, mark = identity
        if info.type != fs.FileType.File or info.size != size_bytes:
            return False
        if isinstance(mark, str):
            # In the copy that a Ray job has of its working directory nothing is rewritten.
            return True
        if mark is None or info.mtime_ns is None or isinstance(self._fs, fs.LocalFileSystem):
            return mark == info.mtime_ns
        # Object stores may give fractions of a second when they list a folder and none when asked for one file.
        return mark // NS_PER_S == info.mtime_ns // NS_PER_S

    def _drop_cursor(self) -> None:
        if self._cursor is not None:
            self._cursor.close()
        self._cursor = None
        self._ranges.close()

    def _read(self, shard: Shard) -> tuple[pa.Table, Index]:
        """The rows of the shard and their places in the file, row groups left out that the filter drops as a whole."""
        if shard.byte_start is not None:
            table, index = self._read_text(shard), np.arange(shard.row_start, shard.row_stop, dtype=np.int64)
            absent = {name for name, _ in shard.constants if name not in shard.names}
            table = table.drop_columns([name for name in table.column_names if name in absent])
        else:
            table, index = self._read_batches(shard)
        table = add_constants(table, shard.constants, schema=self.schema)
        columns = [_column(table, field) for field in self.schema]
        return pa.Table.from_arrays(columns, schema=self.schema), index

    def _read_text(self, shard: Shard) -> pa.Table:
        assert shard.byte_start is not None
        assert shard.byte_stop is not None
        data = self._ranges.read(shard.path, shard.byte_start, shard.byte_stop)
        if shard.format == "jsonl":
            return parse_lines(data, schema=self.schema, file=shard.path, row_start=shard.row_start)
        return parse_records(
            data,
            names=list(shard.names),
            schema=self.schema,
            delimiter=field_delimiter(shard.path, default=self._delimiter),
            file=shard.path,
            row_start=shard.row_start,
        )

    def _read_batches(self, shard: Shard) -> tuple[pa.Table, Index]:
        if self._cursor is None or not self._cursor.can_read(shard.path, shard.row_start):
            self._drop_cursor()
            names = self.schema.names
            if shard.format == "parquet":
                self._cursor = parquet_cursor(
                    self._fs,
                    shard.path,
                    row_start=shard.row_start,
                    names=names,
                    row_groups=self._pruner.row_groups(self._fs, shard.path) if self._pruner.can_prune else None,
                )
            else:
                self._cursor = arrow_cursor(self._fs, shard.path, names=names)
        table, index = self._cursor.take(shard.row_start, shard.row_stop, empty=self.schema)
        if table.num_columns == 0:
            return pa.table({ROW_INDEX: pa.nulls(len(index))}), index
        return table, index


def pack_bits(keep: np.ndarray[Any, np.dtype[np.bool_]]) -> str:
    """A mask over rows as text."""
    return base64.b64encode(np.packbits(keep).tobytes()).decode()


def unpack_bits(text: str, *, num_rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The mask that ``pack_bits`` wrote."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=num_rows).astype(np.bool_)


def _column(table: pa.Table, field: pa.Field[Any]) -> Any:
    if field.name not in table.column_names:
        return pa.nulls(table.num_rows, type=field.type)
    column = table.column(field.name)
    return column if column.type.equals(field.type) else column.cast(field.type)
