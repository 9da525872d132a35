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
from dspark_batch.job.config import JobConfig

PUBLISHED_FILE = "published.json"
RUN_KEY = "dspark-batch.run"
PUBLICATION_KEY = "dspark-batch.publication"
FINGERPRINT_KEY = "dspark-batch.fingerprint"
MAX_PUBLISH_ATTEMPTS = 5


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

    Raises ConfigError naming the columns whose types Delta and Iceberg lack.
    """
    rows = row_schema(config, input_schema=columns_to_read(config, schema=plan_schema)).output
    fields = [pa.field(field.name, plain_type(field.type)) for field in rows]
    problems = [
        Problem(
            "output.format", f"column {field.name!r} has type {field.type}, which {config.output.format} cannot hold"
        )
        for field in fields
        if _is_foreign(field.type)
    ]
    if problems:
        raise ConfigError(problems)
    return pa.schema(fields)


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
    """The type without what Parquet files do not show: dictionaries and 64-bit offsets, names of list items."""
    if isinstance(kind, pa.DictionaryType):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    return kind


def _is_foreign(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_is_foreign(kind.field(place).type) for place in range(kind.num_fields))
    return bool(
        pa.types.is_unsigned_integer(kind)
        or pa.types.is_null(kind)
        or pa.types.is_time(kind)
        or pa.types.is_duration(kind)
        or pa.types.is_float16(kind)
        or (pa.types.is_timestamp(kind) and kind.unit != "us")
    )


def _shown(columns: Mapping[str, pa.DataType]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns.items())
