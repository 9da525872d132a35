"""Delta tables, read at a pinned version and written in one transaction per run. Needs the package ``deltalake``."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.extras import require
from dspark_batch.batch.hive import Constants
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.publication import (
    MAX_PUBLISH_ATTEMPTS,
    Publication,
    check_columns,
    next_publication,
    summary_of,
)
from dspark_batch.batch.sources import InputFile, InputFiles, open_input
from dspark_batch.errors import InputError, OutputError, TransientStorageError
from dspark_batch.job.config import InputSection

if TYPE_CHECKING:
    from deltalake import DeltaTable

UNREADABLE_FEATURES = ("columnMapping", "deletionVectors", "variantType", "variantType-preview")
"""Reader features under which the files alone do not hold the table's rows and columns."""


def delta_files(section: InputSection, *, version: int | None) -> InputFiles:
    """The Parquet files of a Delta table at a version (default: the newest), with their partition columns.

    Raises InputError where there is no such table or version, or where it has deletion vectors or mapped columns.
    """
    assert isinstance(section.path, str)
    deltalake = require("deltalake", extra="delta", needed_for="input.format delta", error=InputError)
    used, folder = open_input(section.path)
    try:
        table: DeltaTable = deltalake.DeltaTable(_table_uri(section.path, used), version=version)
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        schema = _columns(table)
        protocol, configuration = table.protocol(), table.metadata().configuration
        at = table.version()
    except (deltalake.exceptions.DeltaError, OSError, ValueError) as error:
        raise InputError(f"{section.path}: cannot be read as a Delta table: {error}") from error
    features = [name for name in protocol.reader_features or () if name in UNREADABLE_FEATURES]
    if configuration.get("delta.columnMapping.mode", "none") == "none" and "columnMapping" in features:
        features.remove("columnMapping")
    if "deletionVectors" in features and not _has_deleted_rows(table):
        features.remove("deletionVectors")
    if features:
        raise InputError(
            f"{section.path}: version {at} uses {', '.join(features)}, which is not supported; rewrite the table "
            "without (for deletion vectors: REORG TABLE ... APPLY (PURGE))"
        )
    files = [_input_file(action, folder=folder) for action in actions]
    files.sort(key=lambda file: file.path)
    if not files:
        raise InputError(f"{section.path}: version {at} of the table has no rows")
    return InputFiles(filesystem=used, format="parquet", files=tuple(files), version=at, schema=schema)


def publish_delta(run: RunStore, entries: dict[str, ManifestEntry], *, schema: pa.Schema) -> None:
    """Put a run's committed files into the Delta table at the output path, in one transaction, once.

    In mode overwrite they take the place of all that the table has. Raises OutputError; TransientStorageError where
    other writers were faster too often.
    """
    deltalake = require("deltalake", extra="delta", needed_for="output.format delta", error=OutputError)
    uri = _table_uri(run.path, run.store.filesystem)
    failures = (deltalake.exceptions.CommitFailedError, deltalake.exceptions.DeltaProtocolError)
    last: Exception | None = None
    for _ in range(MAX_PUBLISH_ATTEMPTS):
        try:
            table = _open_or_create(deltalake, uri, schema=schema)
            _check_fits(table, schema, run=run)
            known = table.transaction_version(_app_id(run)) or 0
            publication = next_publication(run, entries, table_version=known)
            if publication is not None:
                _commit(deltalake, table, run, publication, schema=schema)
            return
        except failures as error:
            last = error
        except (deltalake.exceptions.DeltaError, OSError, ValueError) as error:
            raise OutputError(f"{run.path}: cannot commit to the Delta table: {error}") from error
    raise TransientStorageError(
        f"{run.path}: other writers changed the Delta table {MAX_PUBLISH_ATTEMPTS} times while this run committed: "
        f"{last}"
    )


def check_delta_table(run: RunStore, *, schema: pa.Schema) -> None:
    """Raise OutputError where there is a table that ``publish_delta`` could not write to. Makes none."""
    deltalake = require("deltalake", extra="delta", needed_for="output.format delta", error=OutputError)
    uri = _table_uri(run.path, run.store.filesystem)
    try:
        if deltalake.DeltaTable.is_deltatable(uri):
            _check_fits(deltalake.DeltaTable(uri), schema, run=run)
    except (deltalake.exceptions.DeltaError, OSError, ValueError) as error:
        raise OutputError(f"{run.path}: the Delta table cannot be opened: {error}") from error


def _commit(deltalake: Any, table: DeltaTable, run: RunStore, publication: Publication, *, schema: pa.Schema) -> None:
    from deltalake.transaction import AddAction, RemoveAction

    now_ms = int(time.time() * 1000)
    actions: list[Any] = [
        AddAction(
            path=run.ticket.file_name(entry.file),
            size=entry.size_bytes,
            partition_values={},
            modification_time=now_ms,
            data_change=True,
            stats=json.dumps({"numRecords": entry.stats.num_output_rows}),
        )
        for entry in publication.added
    ]
    actions += [RemoveAction(name, True, now_ms) for name in publication.removed]
    table.create_write_transaction(
        actions,
        mode="overwrite" if run.mode == "overwrite" and publication.version == 1 else "append",
        schema=deltalake.Schema.from_arrow(schema),
        partition_by=[],
        commit_properties=deltalake.CommitProperties(
            custom_metadata=summary_of(run, publication),
            app_transactions=[deltalake.Transaction(_app_id(run), publication.version)],
        ),
    )


def _open_or_create(deltalake: Any, uri: str, *, schema: pa.Schema) -> DeltaTable:
    if not deltalake.DeltaTable.is_deltatable(uri):
        deltalake.DeltaTable.create(uri, schema=deltalake.Schema.from_arrow(schema), mode="ignore")
    table: DeltaTable = deltalake.DeltaTable(uri)
    return table


def _check_fits(table: DeltaTable, schema: pa.Schema, *, run: RunStore) -> None:
    if table.metadata().partition_columns:
        raise OutputError(f"{run.path}: the Delta table is partitioned, which is not supported; choose another table")
    check_columns(_columns(table), schema, table=run.path)


def _columns(table: DeltaTable) -> pa.Schema:
    exported: Any = table.schema().to_arrow()
    return pa.schema(exported)


def _input_file(action: dict[str, Any], *, folder: str) -> InputFile:
    from urllib.parse import unquote

    constants: Constants = tuple(
        (name.removeprefix("partition."), _text(value))
        for name, value in action.items()
        if name.startswith("partition.")
    )
    relative = unquote(action["path"])
    return InputFile(
        path=f"{folder}/{relative}",
        relative=relative,
        size_bytes=action["size_bytes"],
        mtime_ns=_milliseconds(action["modification_time"]) * 1_000_000,
        constants=constants,
    )


def _milliseconds(value: Any) -> int:
    return int(value) if isinstance(value, int) else int(value.timestamp() * 1000)


def _text(value: object) -> str | None:
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def _has_deleted_rows(table: DeltaTable) -> bool:
    return pa.RecordBatchReader.from_stream(table.deletion_vectors()).read_all().num_rows > 0


def _table_uri(path: str, filesystem: fs.FileSystem) -> str:
    return str(path) if not isinstance(filesystem, fs.LocalFileSystem) else open_input(path, None)[1]


def _app_id(run: RunStore) -> str:
    return f"dspark-batch/{run.ticket.uid}"
