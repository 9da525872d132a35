"""Delta and Iceberg as inputs: the version is fixed when the run begins, and a resumed run goes on with it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
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
