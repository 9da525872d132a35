"""Every format of a job's output, over a small table as input; read back by readers that know nothing of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dspark_batch.job.config import JobConfig

NUM_ROWS = 41


def rows_of(start: int, stop: int) -> pa.Table:
    """Rows start .. stop-1 with the columns id, text and n."""
    numbers = range(start, stop)
    return pa.table({"id": [f"r{n}" for n in numbers], "text": [f"text {n}" for n in numbers], "n": list(numbers)})


def catalog_of(folder: Path) -> dict[str, str]:
    """Properties of a local SQL catalog below ``folder``."""
    return {"name": "local", "type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/w"}


class TableOutput:
    """An output: its config, and its rows as a reader of the table sees them."""

    def __init__(self, folder: Path, format: str) -> None:
        self.folder = folder
        self.format = format
        folder.mkdir(parents=True, exist_ok=True)

    def write_input(self, name: str, table: pa.Table) -> None:
        (self.folder / "in").mkdir(exist_ok=True)
        pq.write_table(table, self.folder / "in" / name, row_group_size=9)

    def config(self, **sections: Any) -> JobConfig:
        output: dict[str, Any] = {"path": str(self.folder / "out"), "format": self.format, "column": "answer"}
        if self.format == "iceberg":
            output |= {"table": "nightly.answers", "catalog": catalog_of(self.folder)}
        values: dict[str, Any] = {
            "input": {"path": str(self.folder / "in"), "id": "id"},
            "prompt": {"template": "Say {{ text }}"},
            "sampling": {"temperature": 0.5},
            "output": output,
            "shards": {"rows": 9},
            "engine": {"backend": "local"},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return JobConfig.model_validate(values)

    def make(self, schema: pa.Schema, *, partition_by: str | None = None) -> None:
        """Make the table, empty, as others would have."""
        if self.format == "delta":
            from deltalake import DeltaTable, Schema

            DeltaTable.create(self.folder / "out", Schema.from_arrow(schema), partition_by=partition_by)
            return
        from pyiceberg.catalog import load_catalog

        catalog = load_catalog(**catalog_of(self.folder))
        catalog.create_namespace("nightly")
        table = catalog.create_table("nightly.answers", schema=schema)
        if partition_by is not None:
            with table.update_spec() as change:
                change.add_identity(partition_by)

    def is_made(self) -> bool:
        """Whether the table is there."""
        if self.format == "delta":
            from deltalake import DeltaTable

            return DeltaTable.is_deltatable(str(self.folder / "out"))
        return self._table() is not None

    def read(self) -> list[dict[str, Any]]:
        """All rows in the order of ``n``; none where there is no table yet."""
        readers = {"parquet": self._parquet, "delta": self._delta, "iceberg": self._iceberg}
        found = readers[self.format]()
        return [] if found is None else sorted(found.to_pylist(), key=lambda row: row["n"])

    def files(self) -> set[str]:
        """The data files that a reader takes as the table: those that its log lists, or all Parquet files there."""
        if self.format == "parquet":
            return {str(file) for file in (self.folder / "out").glob("*.parquet")}
        if self.format == "delta":
            from deltalake import DeltaTable

            return {uri.removeprefix("file://") for uri in DeltaTable(self.folder / "out").file_uris()}
        table = self._table()
        tasks = [] if table is None else table.scan().plan_files()
        return {task.file.file_path.removeprefix("file://") for task in tasks}

    def num_versions(self) -> int:
        """Transactions that added or removed rows."""
        if self.format == "delta":
            from deltalake import DeltaTable

            return DeltaTable(self.folder / "out").version()
        return len(self._table().metadata.snapshots)

    def _parquet(self) -> pa.Table | None:
        files = sorted(self.files())
        return pa.concat_tables([pq.read_table(file) for file in files]) if files else None

    def _delta(self) -> pa.Table | None:
        from deltalake import DeltaTable

        if not DeltaTable.is_deltatable(str(self.folder / "out")):
            return None
        return DeltaTable(self.folder / "out").to_pyarrow_table()

    def _iceberg(self) -> pa.Table | None:
        table = self._table()
        return None if table is None else table.scan().to_arrow()

    def _table(self) -> Any:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NoSuchTableError

        (self.folder / "w").mkdir(exist_ok=True)
        try:
            return load_catalog(**catalog_of(self.folder)).load_table("nightly.answers")
        except NoSuchTableError:
            return None
