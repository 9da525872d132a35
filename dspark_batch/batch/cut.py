"""Cuts one input file into shards, by its kind, at the ends of row groups where some lie nearby."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dspark_batch.batch.cursors import END, arrow_batches
from dspark_batch.batch.delimited import common_kind, csv_columns, cut_records, kind_of_fields, parse_records
from dspark_batch.batch.jsonl import LineRange, cut_lines, inferred_schema, parse_lines
from dspark_batch.batch.ranges import field_delimiter, open_text
from dspark_batch.batch.sources import FileFormat, InputFile
from dspark_batch.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows ``row_start`` to ``row_stop`` of a file, and for text formats the bytes (decompressed) that hold them."""

    row_start: int
    row_stop: int
    byte_start: int | None = None
    byte_stop: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CutFile:
    """A file's columns and pieces. ``names`` are the columns in the order of the file, for formats that need them."""

    schema: pa.Schema
    pieces: tuple[Piece, ...]
    names: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.pieces[-1].row_stop if self.pieces else 0


def cut_file(
    filesystem: fs.FileSystem, file: InputFile, *, format: FileFormat, max_rows: int, delimiter: str, limit: int = END
) -> CutFile:
    """Cut the first ``limit`` rows of a file into pieces of at most ``max_rows``.

    Of text formats nothing is read after these rows, so the columns and their types are those of them. Raises
    InputError naming file and reason.
    """
    try:
        match format:
            case "parquet":
                return _cut_parquet(filesystem, file, max_rows=max_rows, limit=limit)
            case "arrow":
                return _cut_arrow(filesystem, file, max_rows=max_rows, limit=limit)
            case "jsonl":
                return _cut_jsonl(filesystem, file, max_rows=max_rows, limit=limit)
            case "csv":
                used = field_delimiter(file.path, default=delimiter)
                return _cut_csv(filesystem, file, max_rows=max_rows, limit=limit, delimiter=used)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.path}: cannot be read as {NAMES[format]}: {error}") from error


NAMES: dict[FileFormat, str] = {"parquet": "Parquet", "arrow": "Arrow IPC", "jsonl": "JSON lines", "csv": "CSV"}


def cut_groups(group_rows: Sequence[int], *, max_rows: int, limit: int = END) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of at most ``max_rows`` rows over the first ``limit`` rows of row groups, as few as
    possible and about equal.

    A cut moves to the nearest end of a row group where one lies within a quarter of a range.
    """
    ends = np.minimum(np.cumsum(np.asarray(group_rows, dtype=np.int64)), limit)
    total = int(ends[-1]) if len(ends) else 0
    start = 0
    while start < total:
        left = total - start
        size = -(-left // -(-left // max_rows))
        stop = start + size
        place = int(np.searchsorted(ends, stop))
        near = [int(end) for end in ends[max(place - 1, 0) : place + 1]]
        near = [end for end in near if abs(end - stop) <= size // 4 and start < end <= start + max_rows]
        stop = min(near, key=lambda end: (abs(end - stop), end)) if near else stop
        yield start, stop
        start = stop


def unify(before: Sequence[pa.Schema], schema: pa.Schema, *, file: str, format: FileFormat) -> pa.Schema:
    """One schema for all. Columns of text formats get the wider type. Raises InputError naming the file."""
    if format == "csv":
        kinds: dict[str, pa.DataType] = {}
        for field in (field for part in [*before, schema] for field in part):
            kinds[field.name] = common_kind(kinds.get(field.name, pa.null()), field.type)
        return pa.schema(list(kinds.items()))
    try:
        return pa.unify_schemas([*before, schema], promote_options="permissive" if format == "jsonl" else "default")
    except pa.ArrowException as error:
        raise InputError(f"{file}: its columns do not fit those of the rows before it: {error}") from error


def _cut_parquet(filesystem: fs.FileSystem, file: InputFile, *, max_rows: int, limit: int) -> CutFile:
    with filesystem.open_input_file(file.path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        groups = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
    return CutFile(
        schema=_nullable(field.remove_metadata() for field in schema),
        pieces=_pieces(groups, max_rows=max_rows, limit=limit),
    )


def _cut_arrow(filesystem: fs.FileSystem, file: InputFile, *, max_rows: int, limit: int) -> CutFile:
    with filesystem.open_input_file(file.path) as stream:
        schema, batches = arrow_batches(stream)
        sizes = [batch.num_rows for batch in batches]
    return CutFile(schema=_nullable(schema), pieces=_pieces(sizes, max_rows=max_rows, limit=limit))


def _nullable(fields: Iterable[pa.Field[Any]]) -> pa.Schema:
    """Columns that may be NULL, as another file may lack them."""
    return pa.schema([field.with_nullable(True) for field in fields])


def _pieces(groups: Sequence[int], *, max_rows: int, limit: int) -> tuple[Piece, ...]:
    ranges = cut_groups(groups, max_rows=max_rows, limit=limit)
    return tuple(Piece(row_start=start, row_stop=stop) for start, stop in ranges)


def _cut_jsonl(filesystem: fs.FileSystem, file: InputFile, *, max_rows: int, limit: int) -> CutFile:
    schema = pa.schema([])
    pieces: list[Piece] = []
    with open_text(filesystem, file.path) as stream:
        for lines in cut_lines(stream, max_rows=max_rows, limit=limit):
            table = parse_lines(lines.data, schema=None, file=file.path, row_start=lines.row_start)
            found = inferred_schema(table, file=file.path)
            schema = unify([schema], found, file=file.path, format="jsonl")
            pieces.append(_text_piece(lines))
    return CutFile(schema=schema, pieces=tuple(pieces))


def _cut_csv(filesystem: fs.FileSystem, file: InputFile, *, max_rows: int, limit: int, delimiter: str) -> CutFile:
    """Columns whose rows do not agree on a type are text."""
    kinds: dict[str, pa.DataType] = {}
    pieces: list[Piece] = []
    with open_text(filesystem, file.path) as stream:
        for header, lines in cut_records(stream, max_rows=max_rows, limit=limit, delimiter=delimiter):
            names = list(kinds) or csv_columns(header, delimiter=delimiter, file=file.path)
            kinds = kinds or dict.fromkeys(names, pa.null())
            if lines.num_rows == 0:
                break
            table = parse_records(
                lines.data, names=names, schema=None, delimiter=delimiter, file=file.path, row_start=lines.row_start
            )
            for name in names:
                if not pa.types.is_string(kinds[name]):
                    kinds[name] = common_kind(kinds[name], kind_of_fields(table.column(name)))
            pieces.append(_text_piece(lines))
    return CutFile(schema=pa.schema(list(kinds.items())), pieces=tuple(pieces), names=tuple(kinds))


def _text_piece(lines: LineRange) -> Piece:
    return Piece(
        row_start=lines.row_start,
        row_stop=lines.row_start + lines.num_rows,
        byte_start=lines.byte_start,
        byte_stop=lines.byte_stop,
    )
