"""CSV: cutting a file between records, also where quoted fields hold line ends, and parsing with fixed types."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.csv as pc

from dspark_batch.batch.jsonl import LineRange, read_lines
from dspark_batch.errors import InputError

BOM = b"\xef\xbb\xbf"
BOOLEANS = pa.array(["true", "false", "True", "False", "TRUE", "FALSE"])


def csv_columns(header: bytes, *, delimiter: str, file: str) -> list[str]:
    """The column names of a header record. Raises InputError where there are none, or one is empty or occurs twice."""
    try:
        names = pc.read_csv(io.BytesIO(header), parse_options=_parse(delimiter)).column_names
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: the header is not UTF-8 ({error}); save the file as UTF-8") from error
    except pa.ArrowException as error:
        raise InputError(f"{file}: the header cannot be read: {error}") from error
    if not all(names) or len(set(names)) != len(names):
        raise InputError(f"{file}: the header must name every column, each once, got {names}")
    return names


def cut_records(
    stream: IO[bytes] | pa.NativeFile, *, max_rows: int, limit: int, delimiter: str
) -> Iterator[tuple[bytes, LineRange]]:
    """(header, range of records) for ranges of at most ``max_rows`` of the first ``limit`` records. Blank lines are no
    records.

    A header without records comes with an empty range.
    """
    header: bytes | None = None
    row_start = byte_start = num_rows = 0
    taken: list[bytes] = []
    for record in _records(stream, quote_starts=_quote_starts(delimiter)):
        if header is None:
            header, byte_start = record, len(record)
            continue
        taken.append(record)
        num_rows += bool(record.strip(b"\r\n"))
        if num_rows == min(max_rows, limit - row_start):
            part = _range(taken, row_start=row_start, num_rows=num_rows, byte_start=byte_start)
            yield header.removeprefix(BOM), part
            row_start, byte_start, taken, num_rows = row_start + num_rows, part.byte_stop, [], 0
            if row_start == limit:
                return
    if header is not None and (num_rows or row_start == 0):
        yield header.removeprefix(BOM), _range(taken, row_start=row_start, num_rows=num_rows, byte_start=byte_start)


def parse_records(
    data: bytes, *, names: list[str], schema: pa.Schema | None, delimiter: str, file: str, row_start: int
) -> pa.Table:
    """Parse records into columns ``names``, typed by ``schema`` where it has them, else text.

    An empty field is NULL in columns of other types and an empty text in text. Text that is not UTF-8 stays as it is.
    Raises InputError naming the file and the rows.
    """
    known = pa.schema([]) if schema is None else schema
    kinds = {name: known.field(name).type if name in known.names else pa.string() for name in names}
    read = pc.ReadOptions(use_threads=False, block_size=max(len(data) + 1, 2**16), column_names=names)
    convert = pc.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=False, check_utf8=False)
    try:
        return pc.read_csv(
            io.BytesIO(data), read_options=read, parse_options=_parse(delimiter), convert_options=convert
        )
    except pa.ArrowException as error:
        raise InputError(f"{file}, rows from {row_start} (counted from 0, without the header): {error}") from error


def kind_of_fields(fields: pa.ChunkedArray[Any]) -> pa.DataType:
    """The type whose values print as all fields that are not empty: integers, floating-point numbers or text.

    So ``007``, ``1.50`` and integers beyond 64 bits are text. Fields that all say true or false are booleans. Empty
    fields alone are null.
    """
    filled = fields.filter(compute.not_equal(fields, pa.scalar("")))
    if len(filled) == 0:
        return pa.null()
    integers = _cast(filled, pa.int64())
    if integers is not None and integers.cast(pa.string()).equals(filled):
        return pa.int64()
    numbers = _cast(filled, pa.float64())
    if numbers is not None and list(map(repr, numbers.to_pylist())) == filled.to_pylist():
        return pa.float64()
    if compute.all(compute.is_in(filled, value_set=BOOLEANS)).as_py():
        return pa.bool_()
    return pa.string()


def common_kind(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type of a column whose parts have these types: text where they differ."""
    if pa.types.is_null(first) or first == second:
        return second
    return first if pa.types.is_null(second) else pa.string()


def _cast(column: pa.ChunkedArray[Any], kind: Any) -> pa.ChunkedArray[Any] | None:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return None


def _parse(delimiter: str) -> pc.ParseOptions:
    return pc.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def _range(records: list[bytes], *, row_start: int, num_rows: int, byte_start: int) -> LineRange:
    data = b"".join(records)
    return LineRange(
        row_start=row_start, num_rows=num_rows, byte_start=byte_start, byte_stop=byte_start + len(data), data=data
    )


def _quote_starts(delimiter: str) -> bytes:
    return delimiter.encode() + b'"'


def _records(stream: IO[bytes] | pa.NativeFile, *, quote_starts: bytes) -> Iterator[bytes]:
    """Physical lines, joined as long as a quoted field is open."""
    open_lines: list[bytes] = []
    is_quoted = False
    for line in read_lines(stream):
        if is_quoted or b'"' in line:
            is_quoted = _ends_quoted(line, is_quoted=is_quoted, quote_starts=quote_starts)
        open_lines.append(line)
        if not is_quoted:
            yield b"".join(open_lines)
            open_lines = []
    if open_lines:
        yield b"".join(open_lines)


def _ends_quoted(line: bytes, *, is_quoted: bool, quote_starts: bytes) -> bool:
    """Whether a quoted field is open at the end of a line. Quotes inside of an unquoted field are plain text."""
    place = 0
    if not is_quoted and line.startswith((b'"', BOM + b'"')):
        is_quoted, place = True, line.index(b'"') + 1
    while True:
        if is_quoted:
            place = line.find(b'"', place)
            if place < 0:
                return True
            is_escaped = line[place + 1 : place + 2] == b'"'
            is_quoted, place = is_escaped, place + (2 if is_escaped else 1)
        else:
            place = line.find(quote_starts, place)
            if place < 0:
                return False
            is_quoted, place = True, place + len(quote_starts)
