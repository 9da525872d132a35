"""What a run has put into its table and what is still to be put there, so that each shard counts exactly once.

Shard files are committed in the run's folder as for a Parquet output, and enter the table at the end of the run, all in
one transaction that also records the run and a publication number. The intent is written before the transaction; after
a crash the number in the table tells whether it happened. Nothing depends on which files the table lists now, so
compaction by others does no harm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.reader import columns_to_read
from dspark_batch.batch.schema import row_schema
from dspark_batch.errors import ConfigError, OutputError, Problem
from dspark_batch.job.config import JobConfig, OutputFormat

PUBLISHED_FILE = "published.json"
RUN_KEY = "dspark-batch.run"
PUBLICATION_KEY = "dspark-batch.publication"
FINGERPRINT_KEY = "dspark-batch.fingerprint"
MAX_PUBLISH_ATTEMPTS = 5
HELD_TYPES = frozenset(
    {
        pa.bool_(),
        pa.int32(),
        pa.int64(),
        pa.float32(),
        pa.float64(),
        pa.string(),
        pa.binary(),
        pa.date32(),
        pa.timestamp("us"),
        pa.timestamp("us", "UTC"),
    }
)
"""The plain types of single values, besides decimals, that Delta and Iceberg have both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One transaction: entries whose files enter the table, and files (below the output folder) that leave it."""

    version: int
    added: tuple[ManifestEntry, ...]
    removed: tuple[str, ...]


def next_publication(run: RunStore, entries: Mapping[str, ManifestEntry], *, table_version: int) -> Publication | None:
    """What to publish next, with the intent written; None where the table has it all.

    ``table_version`` is the number of the last publication of this run that the table knows, 0 for none. Raises
    OutputError where the table knows of fewer publications than the run made.
    """
    text = run.read_meta(PUBLISHED_FILE)
    record: dict[str, Any] = {"version": 0, "files": {}, "before": {}} if text is None else json.loads(text)
    if record["version"] > table_version + 1 or record["version"] < table_version:
        raise OutputError(
            f"{run.path}: this run published {record['version']} times and its table knows of {table_version}; was the "
            "table replaced or rolled back? Use output.mode=overwrite to write it anew"
        )
    published: dict[str, str] = record["files"] if record["version"] == table_version else record["before"]
    wanted = {shard: entry.file for shard, entry in entries.items()}
    if wanted == published and table_version > 0:
        return None
    values = {"version": table_version + 1, "files": wanted, "before": published}
    run.write_meta(PUBLISHED_FILE, json.dumps(values) + "\n")
    return Publication(
        version=table_version + 1,
        added=tuple(entry for shard, entry in sorted(entries.items()) if published.get(shard) != entry.file),
        removed=tuple(
            run.ticket.file_name(file) for shard, file in sorted(published.items()) if wanted.get(shard) != file
        ),
    )


def summary_of(run: RunStore, publication: Publication) -> dict[str, str]:
    """What the transaction says of itself in the table's history."""
    return {
        RUN_KEY: run.ticket.uid,
        PUBLICATION_KEY: str(publication.version),
        FINGERPRINT_KEY: run.ticket.fingerprint,
    }


def table_schema(config: JobConfig, *, plan_schema: pa.Schema) -> pa.Schema:
    """The columns of the output as a table format stores them.

    Raises ConfigError naming the columns whose types the format lacks.
    """
    rows = row_schema(config, input_schema=columns_to_read(config, schema=plan_schema)).output
    fields = [pa.field(field.name, plain_type(field.type)) for field in rows]
    problems = [
        Problem(
            "output.format",
            f"column {field.name!r} has type {field.type}, which {config.output.format} cannot hold; "
            "leave it out of input.columns, or convert it in the input",
        )
        for field in fields
        if not _is_held(field.type, format=config.output.format)
    ]
    if problems:
        raise ConfigError(problems)
    return pa.schema(fields)


def check_target(run: RunStore, config: JobConfig, *, plan_schema: pa.Schema) -> None:
    """Check, before anything is generated, that the run can be published. Makes no table.

    Raises:
        ConfigError: columns have types that the table format lacks.
        OutputError: the table that is there already does not fit, or cannot be opened.
    """
    if config.output.format == "parquet":
        return
    schema = table_schema(config, plan_schema=plan_schema)
    if config.output.format == "delta":
        from dspark_batch.batch.delta import check_delta_table

        check_delta_table(run, schema=schema)
    else:
        from dspark_batch.batch.iceberg import check_iceberg_table

        check_iceberg_table(config.output, schema=schema)


def check_columns(found: pa.Schema, wanted: pa.Schema, *, table: str) -> None:
    """Raise OutputError where a table that is there already has other columns."""
    there = {field.name: plain_type(field.type) for field in found}
    here = {field.name: plain_type(field.type) for field in wanted}
    if list(there.items()) != list(here.items()):
        raise OutputError(
            f"table {table} has other columns than this run writes: {_shown(there)} there, {_shown(here)} here; "
            "choose another table"
        )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without what Parquet files do not show.

    That is dictionaries, 64-bit offsets, the length of lists, the names of their items, and the zone of instants.
    """
    if isinstance(kind, pa.DictionaryType):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp(kind.unit, "UTC")
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    return kind


def _is_held(kind: pa.DataType, *, format: OutputFormat) -> bool:
    """Whether a table of the format gives a column of this plain type back with the same type."""
    if pa.types.is_list(kind) or pa.types.is_map(kind) or pa.types.is_struct(kind):
        return all(_is_held(kind.field(place).type, format=format) for place in range(kind.num_fields))
    if pa.types.is_fixed_size_binary(kind) or kind == pa.uuid():
        return format == "iceberg"
    return kind in HELD_TYPES or pa.types.is_decimal128(kind) or (format == "delta" and kind in (pa.int8(), pa.int16()))


def _shown(columns: Mapping[str, pa.DataType]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns.items())
