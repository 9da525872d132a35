"""Delta and Iceberg as inputs: the version is fixed when the run begins, and a resumed run goes on with it."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.sources import find_input_files
from dspark_batch.errors import FingerprintMismatchError, InputError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.faulty_store import FaultyStore, SimulatedCrashError
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.table_outputs import catalog_of, rows_of


class Source:
    def __init__(self, folder: Path, format: str) -> None:
        self.folder, self.format = folder, format
        (folder / "w").mkdir()

    def append(self, table: pa.Table) -> None:
        if self.format == "delta":
            from deltalake import write_deltalake

            write_deltalake(self.folder / "table", table, mode="append")
            return
        from pyiceberg.catalog import load_catalog

        catalog = load_catalog(**catalog_of(self.folder))
        catalog.create_namespace_if_not_exists("ns")
        catalog.create_table_if_not_exists("ns.source", schema=table.schema).append(table)

    def replace(self, table: pa.Table) -> None:
        if self.format == "delta":
            from deltalake import DeltaTable, write_deltalake

            write_deltalake(self.folder / "table", table, mode="overwrite")
            DeltaTable(self.folder / "table").vacuum(0, enforce_retention_duration=False, dry_run=False)
            return
        from pyiceberg.catalog import load_catalog

        load_catalog(**catalog_of(self.folder)).load_table("ns.source").overwrite(table)

    def append_as_hive(self, table: pa.Table, column: pa.Field, value: object) -> None:
        """A file as in a table migrated from Hive: what it is partitioned by stands in the metadata alone."""
        from pyiceberg.catalog import load_catalog
        from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
        from pyiceberg.table import TableProperties
        from pyiceberg.typedef import Record

        catalog = load_catalog(**catalog_of(self.folder))
        catalog.create_namespace("ns")
        made = catalog.create_table("ns.source", schema=table.schema.append(column))
        with made.update_spec() as change:
            change.add_identity(column.name)
        path = self.folder / "hive.parquet"
        pq.write_table(table, path)
        file = DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=f"file://{path}",
            file_format=FileFormat.PARQUET,
            partition=Record(value),
            record_count=table.num_rows,
            file_size_in_bytes=path.stat().st_size,
        )
        file.spec_id = made.spec().spec_id
        with made.transaction() as change:
            change.set_properties({TableProperties.DEFAULT_NAME_MAPPING: made.schema().name_mapping.model_dump_json()})
            with change.update_snapshot().fast_append() as snapshot:
                snapshot.append_data_file(file)

    def config(self, *, mode: str = "resume", **section) -> JobConfig:
        path = str(self.folder / "table") if self.format == "delta" else "ns.source"
        catalog = None if self.format == "delta" else catalog_of(self.folder)
        return JobConfig.model_validate(
            {
                "input": {"path": path, "format": self.format, "id": "id", "catalog": catalog, **section},
                "prompt": {"template": "Say {{ text }}"},
                "output": {"path": str(self.folder / "out"), "mode": mode},
                "shards": {"rows": 5},
            }
        )

    def numbers(self) -> list[int]:
        return sorted(read_output(str(self.folder / "out"))["n"].to_pylist())


@pytest.fixture(params=["delta", "iceberg"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    pytest.importorskip("deltalake" if request.param == "delta" else "pyiceberg")
    return Source(tmp_path, request.param)


def test_a_resumed_run_goes_on_with_the_version_that_it_began_with(source):
    source.append(rows_of(0, 12))
    path = source.config().output.path
    with pytest.raises(SimulatedCrashError):
        start_run(source.config(), store=FaultyStore(path, fail_at=9))
    source.append(rows_of(12, 20))
    assert start_run(source.config()) >= 1
    assert source.numbers() == list(range(12))
    assert start_run(source.config()) == 0


def test_another_version_than_that_of_the_run_is_another_run(source):
    source.append(rows_of(0, 12))
    first = find_input_files(source.config().input).version
    start_run(source.config(version=first))
    source.append(rows_of(12, 20))
    second = find_input_files(source.config().input).version
    with pytest.raises(FingerprintMismatchError, match=rf"input.version: {first} there, {second} here"):
        start_run(source.config(version=second))
    assert start_run(source.config(version=first)) == start_run(source.config()) == 0
    assert source.numbers() == list(range(12))


def test_an_overwrite_at_another_version_than_the_one_that_broke_begins_anew(source):
    source.append(rows_of(0, 12))
    first = find_input_files(source.config().input).version
    source.append(rows_of(12, 20))
    second = find_input_files(source.config().input).version
    path = source.config().output.path
    with pytest.raises(SimulatedCrashError):
        start_run(source.config(mode="overwrite", version=first), store=FaultyStore(path, fail_at=11))
    start_run(source.config(mode="overwrite", version=second))
    assert source.numbers() == list(range(20))


def test_a_nightly_run_takes_what_was_appended(source):
    source.append(rows_of(0, 12))
    config = source.config(incremental="files")
    start_run(config)
    source.append(rows_of(12, 20))
    assert start_run(config) == 2
    assert source.numbers() == list(range(20))


def test_planned_rows_whose_files_left_the_table_are_taken_from_its_new_ones(source):
    source.append(rows_of(0, 12))
    config = source.config(incremental="rows")
    with pytest.raises(SimulatedCrashError):
        start_run(config, store=FaultyStore(config.output.path, fail_at=11))
    source.replace(rows_of(3, 20))
    assert start_run(config) > 1
    assert set(range(3, 20)) <= set(source.numbers())
    assert len(set(source.numbers())) == len(source.numbers())


def test_a_table_that_is_not_there_or_empty_at_that_version_is_named(source):
    with pytest.raises(InputError, match="table"):
        start_run(source.config())
    source.append(rows_of(0, 3))
    with pytest.raises(InputError, match=r"999|version"):
        start_run(source.config(version=999))


def test_partition_columns_of_a_delta_table_are_columns(tmp_path):
    deltalake = pytest.importorskip("deltalake")
    table = pa.table({"id": ["a", "b", "c"], "text": ["x", "y", "z"], "n": [1, 2, 3], "k": ["a b", "c/d", None]})
    deltalake.write_deltalake(tmp_path / "table", table, partition_by=["k"])
    source = Source(tmp_path, "delta")
    start_run(source.config())
    found = read_output(str(tmp_path / "out")).to_pylist()
    assert {row["id"]: row["k"] for row in found} == {"a": "a b", "b": "c/d", "c": None}


PARTITIONS = [
    (pa.int32(), 5, 5),
    (pa.string(), "a b/c", "a b/c"),
    (pa.string(), None, None),
    (pa.date32(), 20513, date(2026, 3, 1)),
    (pa.bool_(), False, False),
    (pa.decimal128(9, 2), Decimal("-1.20"), Decimal("-1.20")),
]


@pytest.mark.parametrize(("kind", "partition", "value"), PARTITIONS, ids=str)
def test_partition_columns_that_the_files_of_an_iceberg_table_do_not_store_are_columns(
    tmp_path, kind, partition, value
):
    pytest.importorskip("pyiceberg")
    source = Source(tmp_path, "iceberg")
    source.append_as_hive(rows_of(0, 3), pa.field("k", kind), partition)
    start_run(source.config(filter="n > 0"))
    assert [row["k"] for row in read_output(str(tmp_path / "out")).to_pylist()] == [value, value]


def test_a_partition_column_that_has_no_text_is_refused_rather_than_read_as_null(tmp_path):
    pytest.importorskip("pyiceberg")
    source = Source(tmp_path, "iceberg")
    source.append_as_hive(rows_of(0, 3), pa.field("k", pa.binary()), b"\xff")
    with pytest.raises(
        InputError, match=r"hive\.parquet: stores no column 'k', and its partition's value b'\\xff' has"
    ):
        start_run(source.config())


def test_a_file_of_a_table_that_is_gone_is_named(source):
    source.append(rows_of(0, 3))
    for file in source.folder.rglob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match=r"\.parquet: cannot be read as Parquet"):
        start_run(source.config())


def test_renamed_columns_of_an_iceberg_table_are_refused_rather_than_read_wrongly(tmp_path):
    pyiceberg = pytest.importorskip("pyiceberg.catalog")
    source = Source(tmp_path, "iceberg")
    source.append(rows_of(0, 3))
    table = pyiceberg.load_catalog(**catalog_of(tmp_path)).load_table("ns.source")
    with table.update_schema() as change:
        change.rename_column("text", "body")
    with pytest.raises(InputError, match="its column 'text' is 'body' in the table"):
        start_run(source.config())


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    import sys

    for module, format, extra in (("deltalake", "delta", "delta"), ("pyiceberg.catalog", "iceberg", "iceberg")):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / format).mkdir()
        with pytest.raises(InputError, match=rf"pip install 'dspark-batch\[{extra}\]'"):
            start_run(Source(tmp_path / format, format).config())
