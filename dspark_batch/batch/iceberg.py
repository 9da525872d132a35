"""Iceberg tables, read at a pinned snapshot and written in one transaction per run. Needs the package ``pyiceberg``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.extras import require
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.publication import (
    MAX_PUBLISH_ATTEMPTS,
    PUBLICATION_KEY,
    Publication,
    check_columns,
    next_publication,
    plain_type,
    summary_of,
)
from dspark_batch.batch.sources import InputFile, InputFiles
from dspark_batch.errors import DSparkBatchError, InputError, OutputError, TransientStorageError
from dspark_batch.job.config import InputSection, OutputSection

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.schema import Schema
    from pyiceberg.table import Table

FIELD_ID = b"PARQUET:field_id"


def iceberg_files(section: InputSection, *, snapshot_id: int | None) -> InputFiles:
    """The Parquet files of an Iceberg table at a snapshot (default: the newest).

    Raises InputError where there is no such table or snapshot, or where rows were deleted or columns renamed without
    the files having been rewritten.
    """
    assert isinstance(section.path, str)
    table = _load(section.path, section.catalog, needed_for="input.format iceberg", error=InputError)
    snapshot = table.current_snapshot() if snapshot_id is None else table.snapshot_by_id(snapshot_id)
    if snapshot is None:
        raise InputError(f"{section.path}: the table has no snapshot {snapshot_id or '(it is empty)'}")
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    scan = table.scan(snapshot_id=snapshot.snapshot_id)
    tasks = sorted(scan.plan_files(), key=lambda task: task.file.file_path)
    if any(task.delete_files for task in tasks):
        raise InputError(
            f"{section.path}: snapshot {snapshot.snapshot_id} has rows deleted beside their files (merge on read), "
            "which is not supported; compact the table first"
        )
    if not tasks:
        raise InputError(f"{section.path}: snapshot {snapshot.snapshot_id} has no rows")
    used = _filesystem(table)
    found = schema_to_pyarrow(scan.projection(), include_field_ids=False)
    schema = pa.schema([pa.field(field.name, plain_type(field.type)) for field in found])
    files = tuple(
        _input_file(
            task.file,
            filesystem=used,
            table=table,
            values=_partition(task.file, table, scan.projection()),
            schema=schema,
        )
        for task in tasks
    )
    return InputFiles(filesystem=used, format="parquet", files=files, version=snapshot.snapshot_id, schema=schema)


def iceberg_filesystem(section: InputSection) -> fs.FileSystem:
    """The filesystem of the table's files, with the catalog's settings. Raises InputError."""
    assert isinstance(section.path, str)
    return _filesystem(_load(section.path, section.catalog, needed_for="input.format iceberg", error=InputError))


def publish_iceberg(
    run: RunStore, entries: dict[str, ManifestEntry], *, section: OutputSection, schema: pa.Schema
) -> None:
    """Put a run's committed files into the Iceberg table, in one transaction, once.

    In mode overwrite they take the place of all that the table has. Raises OutputError; TransientStorageError where
    other writers were faster too often.
    """
    assert section.table is not None
    from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException, RESTError

    last: Exception | None = None
    for _ in range(MAX_PUBLISH_ATTEMPTS):
        table = open_output_table(section, schema=schema)
        known = int(table.properties.get(_property(run), "0"))
        try:
            publication = next_publication(run, entries, table_version=known)
            if publication is not None:
                _commit(table, run, publication)
            return
        except (CommitFailedException, CommitStateUnknownException) as error:
            last = error
        except (RESTError, OSError, ValueError, pa.ArrowException) as error:
            raise OutputError(f"{section.table}: cannot commit to the Iceberg table: {error}") from error
    raise TransientStorageError(
        f"{section.table}: other writers changed the Iceberg table {MAX_PUBLISH_ATTEMPTS} times while this run "
        f"committed: {last}"
    )


def open_output_table(section: OutputSection, *, schema: pa.Schema) -> Table:
    """The table to write, made where it is missing. Raises OutputError where it does not fit."""
    assert section.table is not None
    catalog = _catalog(section.catalog, needed_for="output.format iceberg", error=OutputError)
    try:
        catalog.create_namespace_if_not_exists(section.table.rpartition(".")[0])
        table: Table = catalog.create_table_if_not_exists(section.table, schema=schema)
    except Exception as error:
        raise OutputError(f"{section.table}: the Iceberg table cannot be opened or made: {error}") from error
    _check_fits(table, schema, name=section.table)
    return table


def check_iceberg_table(section: OutputSection, *, schema: pa.Schema) -> None:
    """Raise OutputError where there is a table that ``publish_iceberg`` could not write to. Makes none."""
    assert section.table is not None
    catalog = _catalog(section.catalog, needed_for="output.format iceberg", error=OutputError)
    try:
        table = catalog.load_table(section.table) if catalog.table_exists(section.table) else None
    except Exception as error:
        raise OutputError(f"{section.table}: the Iceberg table cannot be opened: {error}") from error
    if table is not None:
        _check_fits(table, schema, name=section.table)


def _check_fits(table: Table, schema: pa.Schema, *, name: str) -> None:
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    if table.spec().fields:
        raise OutputError(f"{name}: the table is partitioned, which is not supported; choose another table")
    check_columns(schema_to_pyarrow(table.schema(), include_field_ids=False), schema, table=name)


def _commit(table: Table, run: RunStore, publication: Publication) -> None:
    from pyiceberg.io.pyarrow import parquet_files_to_data_files
    from pyiceberg.table import TableProperties

    removed = {_uri(run, name) for name in publication.removed}
    is_overwrite = run.mode == "overwrite" and publication.version == 1
    leaving = [task.file for task in table.scan().plan_files() if is_overwrite or task.file.file_path in removed]
    if not is_overwrite and len(leaving) != len(removed):
        raise OutputError(
            f"{run.path}: files whose rows were generated again are not in the table any more (it was compacted); "
            "use output.mode=overwrite"
        )
    paths = [_uri(run, run.ticket.file_name(entry.file)) for entry in publication.added]
    with table.transaction() as change:
        properties = {_property(run): str(publication.version)}
        if table.name_mapping() is None:
            properties[TableProperties.DEFAULT_NAME_MAPPING] = table.schema().name_mapping.model_dump_json()
        change.set_properties(properties)
        files = list(parquet_files_to_data_files(table.io, change.table_metadata, iter(paths))) if paths else []
        update = change.update_snapshot(snapshot_properties=summary_of(run, publication))
        producer = update.overwrite() if leaving else update.fast_append()
        with producer as snapshot:
            for file in leaving:
                snapshot.delete_data_file(file)
            for file in files:
                snapshot.append_data_file(file)


def _catalog(properties: dict[str, str] | None, *, needed_for: str, error: type[DSparkBatchError]) -> Any:
    module = require("pyiceberg.catalog", extra="iceberg", needed_for=needed_for, error=error)
    values = dict(properties or {})
    try:
        return module.load_catalog(values.pop("name", "default"), **values)
    except Exception as reason:
        raise error(f"{needed_for}: the catalog cannot be opened: {reason}") from reason


def _load(name: str, properties: dict[str, str] | None, *, needed_for: str, error: type[DSparkBatchError]) -> Table:
    catalog = _catalog(properties, needed_for=needed_for, error=error)
    try:
        table: Table = catalog.load_table(name)
    except Exception as reason:
        raise error(f"{name}: the Iceberg table cannot be opened: {reason}") from reason
    return table


def _filesystem(table: Table) -> fs.FileSystem:
    from pyiceberg.io.pyarrow import PyArrowFileIO

    scheme, netloc, _ = PyArrowFileIO.parse_location(table.location())
    return PyArrowFileIO(table.io.properties).fs_by_scheme(scheme, netloc)


def _input_file(
    file: DataFile, *, filesystem: fs.FileSystem, table: Table, values: Mapping[str, Any], schema: pa.Schema
) -> InputFile:
    """The file, with those of the partition's ``values`` that it does not store as constants."""
    from pyiceberg.io.pyarrow import PyArrowFileIO

    _, _, path = PyArrowFileIO.parse_location(file.file_path)
    stored = _stored_columns(filesystem, path, table=table)
    absent = [name for name in schema.names if name in values and name not in stored]
    return InputFile(
        path=path,
        relative=file.file_path.removeprefix(table.location()).lstrip("/"),
        size_bytes=file.file_size_in_bytes,
        mtime_ns=None,
        constants=tuple((name, _text(values[name], schema.field(name), path=path)) for name in absent),
    )


def _partition(file: DataFile, table: Table, schema: Schema) -> dict[str, Any]:
    """The values of the columns by which the file's partition is made as they are. Hive's files do not store them."""
    from pyiceberg.transforms import IdentityTransform

    fields = table.specs()[file.spec_id].fields
    return {
        name: file.partition[place]
        for place, field in enumerate(fields)
        if isinstance(field.transform, IdentityTransform) and (name := schema.find_column_name(field.source_id))
    }


def _text(value: Any, field: pa.Field[Any], *, path: str) -> str | None:
    try:
        text: str | None = pa.scalar(value, field.type).cast(pa.string()).as_py()
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: stores no column {field.name!r}, and its partition's value {value!r} has no text: {error}; "
            "rewrite the files"
        ) from error
    return text


def _stored_columns(filesystem: fs.FileSystem, path: str, *, table: Table) -> list[str]:
    """The columns in the file. Iceberg finds them by number, the reader by name: files where they disagree are refused.

    Raises InputError.
    """
    names = {field.field_id: field.name for field in table.schema().fields}
    try:
        with filesystem.open_input_file(path) as stream:
            schema = pq.ParquetFile(stream).schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from error
    for field in schema:
        number = (field.metadata or {}).get(FIELD_ID)
        if number is not None and names.get(int(number), field.name) != field.name:
            raise InputError(
                f"{path}: its column {field.name!r} is {names[int(number)]!r} in the table; rewrite the files "
                "written before the column was renamed"
            )
    return schema.names


def _uri(run: RunStore, name: str) -> str:
    scheme = run.path.partition("://")[0] if "://" in run.path else "file"
    return f"{scheme}://{run.store.root}/{name}"


def _property(run: RunStore) -> str:
    return f"{PUBLICATION_KEY}.{run.ticket.uid}"
