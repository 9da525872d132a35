"""Columns that stand in folder names (``country=de/day=2026-11-23/``), as Hive and Spark write partitioned tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

Constants = tuple[tuple[str, str | None], ...]
"""(column, value as text or None for NULL); all rows of a file share them."""

NULL_VALUE = "__HIVE_DEFAULT_PARTITION__"


def partition_of(relative: str) -> Constants:
    """The columns in the folders of a path."""
    pairs = [part.split("=", 1) for part in relative.split("/")[:-1] if "=" in part and not part.startswith("=")]
    return tuple((unquote(name), None if value == NULL_VALUE else unquote(value)) for name, value in pairs)


def constant_fields(files: Iterable[Constants]) -> list[pa.Field[Any]]:
    """A field for every such column: int64 where every value is a whole number in its shortest form, else string."""
    values: dict[str, set[str]] = {}
    for constants in files:
        for name, value in constants:
            known = values.setdefault(name, set())
            if value is not None:
                known.add(value)
    return [pa.field(name, pa.int64() if _all_integers(found) else pa.string()) for name, found in values.items()]


def add_constants(table: pa.Table, constants: Sequence[tuple[str, str | None]], *, schema: pa.Schema) -> pa.Table:
    """The table with the constants that ``schema`` has and the file has not, in the types of ``schema``."""
    for name, value in constants:
        if name in schema.names and name not in table.column_names:
            kind = schema.field(name).type
            scalar: Any = pa.array([value], pa.string()).cast(kind)[0]
            column = pa.nulls(table.num_rows, kind) if value is None else pa.repeat(scalar, table.num_rows)
            table = table.append_column(name, column)
    return table


def _all_integers(values: set[str]) -> bool:
    return bool(values) and all(
        value.removeprefix("-").isdecimal() and value == str(int(value)) and abs(int(value)) < 2**63 for value in values
    )
