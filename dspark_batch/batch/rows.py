"""A row's identity. It keys the random draw of the row, so it depends on the row and never on how the table is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dspark_batch.batch.schema import missing_columns
from dspark_batch.core import RowError
from dspark_batch.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInput:
    """The rows of one shard as a worker takes them: ``ids[i]`` identifies row i of ``table``.

    Rows in ``failures`` are not generated; they come out with that error.
    """

    key: str
    table: pa.Table
    ids: tuple[str, ...]
    failures: Mapping[int, RowError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.ids) == self.table.num_rows, (self.key, len(self.ids), self.table.num_rows)


def check_id_column(name: str | None, *, schema: pa.Schema) -> list[Problem]:
    """Problems with ``input.id``: a column that is missing or whose values have no text form."""
    if name is None:
        return []
    problems = missing_columns("input.id", [name], schema=schema)
    if problems:
        return problems
    kind = _value_type(schema.field(name).type)
    if pa.types.is_nested(kind) or _is_bytes(kind):
        return [Problem("input.id", f"column {name!r} has type {kind}; ids must be text, numbers, dates or booleans")]
    return []


def row_ids(table: pa.Table, *, id_column: str | None, relative_file: str, row_index: Sequence[int]) -> tuple[str, ...]:
    """The identity of every row of a table.

    The value of the id column as text; where there is no id column or its value is NULL or not valid UTF-8,
    ``<relative file>#<row index in the file>``. Rows with equal ids are allowed: they share their random draws, so
    equal prompts under one id give equal samples.
    """
    if id_column is None:
        return tuple([f"{relative_file}#{index}" for index in row_index])
    column = table.column(id_column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts = text_values(column.cast(pa.large_string()))
    return tuple(
        [f"{relative_file}#{index}" if text is None else text for index, text in zip(row_index, texts, strict=True)]
    )


def text_values(column: pa.ChunkedArray[Any]) -> list[str | None]:
    """A string column as Python values, with None for NULL and for bytes that are not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(scalar) for scalar in column]


def _decoded(scalar: pa.Scalar[Any]) -> str | None:
    try:
        return scalar.as_py()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return None


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
