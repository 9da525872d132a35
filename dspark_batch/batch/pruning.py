"""Which rows of a file can pass the filter at all, by what is known without reading them: folder names and footers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from dspark_batch.batch.cursors import RowGroup, all_row_groups
from dspark_batch.batch.filters import FilterPart, parse_filter, split_filter
from dspark_batch.batch.hive import Constants, add_constants
from dspark_batch.errors import ConfigError


class Pruner:
    """Leaves out what a filter drops as a whole. What it keeps still has to be filtered row by row.

    Without a filter, or with one that is not valid (which others report), it keeps everything.
    """

    def __init__(self, text: str | None, *, schema: pa.Schema) -> None:
        self._schema = schema
        self._parts: list[FilterPart] = []
        if text is not None:
            try:
                parse_filter(text, schema=schema)
            except ConfigError:
                return
            self._parts = split_filter(text, schema=schema)

    @property
    def can_prune(self) -> bool:
        return bool(self._parts)

    def may_match(self, constants: Constants, *, stored: Sequence[str] = ()) -> bool:
        """Whether a file with these constant columns can hold rows that pass. ``stored``: the columns in the file."""
        known = tuple((name, value) for name, value in constants if name in self._schema.names and name not in stored)
        names = {name for name, _ in known}
        parts = [part for part in self._parts if part.columns and part.columns <= names]
        if not parts:
            return True
        row = add_constants(pa.table({"": pa.nulls(1)}), known, schema=self._schema)
        return all(row.filter(part.expression).num_rows for part in parts)

    def row_groups(self, filesystem: fs.FileSystem, path: str) -> tuple[RowGroup, ...]:
        """The row groups of a Parquet file that can hold rows that pass. Reads the footer. Raises what pyarrow raises.

        A condition counts where the file has all its columns in the types of the run's schema.
        """
        fragment: Any = ds.ParquetFileFormat().make_fragment(path, filesystem=filesystem)
        groups = all_row_groups(fragment.metadata)
        same = pa.schema([field for field in fragment.physical_schema if self._has(field)])
        parts = [part.expression for part in self._parts if part.is_decided_by_statistics(same)]
        if not parts:
            return groups
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part
        kept = {group.id for group in fragment.subset(filter=joined, schema=self._schema).row_groups}
        return tuple(group for group in groups if group.index in kept)

    def _has(self, field: pa.Field[Any]) -> bool:
        return field.name in self._schema.names and field.type.equals(self._schema.field(field.name).type)
