"""JSON lines: cutting a file at line ends, and parsing a byte range with a schema that is fixed for the whole input."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from dspark_batch.errors import InputError

CHUNK_BYTES = 8 * 2**20
MAX_EXACT_INTEGER = 2**53
"""Up to here floating-point numbers hold every integer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRange:
    """Consecutive non-blank lines: index of the first in its file, how many, and the bytes that hold them."""

    row_start: int
    num_rows: int
    byte_start: int
    byte_stop: int
    data: bytes


def cut_lines(stream: IO[bytes] | pa.NativeFile, *, max_rows: int, limit: int) -> Iterator[LineRange]:
    """Cut the first ``limit`` non-blank lines of a stream into ranges of at most ``max_rows``.

    Holds one range and one chunk in memory.
    """
    row_start, byte_start = 0, 0
    lines: list[bytes] = []
    num_rows = 0
    for line in read_lines(stream):
        lines.append(line)
        num_rows += bool(line.strip())
        if num_rows == min(max_rows, limit - row_start):
            data = b"".join(lines)
            yield LineRange(
                row_start=row_start,
                num_rows=num_rows,
                byte_start=byte_start,
                byte_stop=byte_start + len(data),
                data=data,
            )
            row_start, byte_start, lines, num_rows = row_start + num_rows, byte_start + len(data), [], 0
            if row_start == limit:
                return
    if num_rows:
        data = b"".join(lines)
        yield LineRange(
            row_start=row_start, num_rows=num_rows, byte_start=byte_start, byte_stop=byte_start + len(data), data=data
        )


def parse_lines(data: bytes, *, schema: pa.Schema | None, file: str, row_start: int) -> pa.Table:
    """Parse lines of JSON objects, one row each, into the schema's columns, or the columns found where it is None.

    Text stays text, also where it looks like a timestamp. Raises InputError naming the file and the row, also for an
    integer that a column of floating-point numbers would round.
    """
    read = pj.ReadOptions(use_threads=False, block_size=max(len(data) + 1, 2**16))
    parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore")
    try:
        table = pj.read_json(io.BytesIO(data), read_options=read, parse_options=parse)
    except pa.ArrowException as error:
        row = re.search(r"in row (\d+)", str(error))
        where = f"row {row_start + int(row[1])}" if row else f"after row {row_start}"
        raise InputError(f"{file}, {where} (counted from 0, blank lines skipped): {error}") from error
    large = [name for name in table.column_names if _has_large_floats(table.column(name))]
    if large:
        _refuse_rounded(data, names=large, file=file, row_start=row_start)
    return table


def inferred_schema(table: pa.Table, *, file: str) -> pa.Schema:
    """The schema to read with, from rows parsed without one. Raises InputError where Parquet cannot hold a column."""
    return pa.schema(
        [pa.field(field.name, _stored_type(field.type, at=field.name, file=file)) for field in table.schema]
    )


def read_lines(stream: IO[bytes] | pa.NativeFile) -> Iterator[bytes]:
    """Lines with their ends, read in large chunks."""
    rest = b""
    while chunk := stream.read(CHUNK_BYTES):
        pieces = (rest + chunk).split(b"\n")
        rest = pieces.pop()
        for piece in pieces:
            yield piece + b"\n"
    if rest:
        yield rest


def _has_large_floats(column: Any) -> bool:
    kind = column.type
    if pa.types.is_list(kind):
        return _has_large_floats(pc.list_flatten(column))
    if pa.types.is_struct(kind):
        return any(_has_large_floats(pc.struct_field(column, place)) for place in range(kind.num_fields))
    return pa.types.is_floating(kind) and (pc.max(pc.abs(column)).as_py() or 0) >= MAX_EXACT_INTEGER


def _refuse_rounded(data: bytes, *, names: Sequence[str], file: str, row_start: int) -> None:
    """Raise InputError for the first integer in the columns that is no floating-point number."""
    for place, line in enumerate(filter(bytes.strip, data.split(b"\n"))):
        row = json.loads(line.decode(errors="replace"))
        for name in names:
            number = _rounded_integer(row.get(name))
            if number is not None:
                raise InputError(
                    f"{file}, row {row_start + place} (counted from 0, blank lines skipped): column {name!r} holds "
                    f"floating-point numbers, which would round {number}; write the column's values in quotes"
                )


def _rounded_integer(value: Any) -> int | None:
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return next((found for part in inner if (found := _rounded_integer(part)) is not None), None)
    if not isinstance(value, int) or (value.bit_length() < 1024 and float(value) == value):
        return None
    return value


def _stored_type(kind: Any, *, at: str, file: str) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_stored_type(kind.value_type, at=f"{at}[]", file=file))
    if pa.types.is_struct(kind):
        if kind.num_fields == 0:
            raise InputError(f"{file}: {at} holds only empty objects, which a table cannot hold; remove it")
        return pa.struct([(field.name, _stored_type(field.type, at=f"{at}.{field.name}", file=file)) for field in kind])
    return kind  # type: ignore[no-any-return]
