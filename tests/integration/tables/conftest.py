"""Fixtures of the table formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_batch.testing.table_outputs import NUM_ROWS, TableOutput, rows_of


@pytest.fixture(params=["delta", "iceberg"])
def make_table(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], TableOutput]:
    """A fresh output of each format, over one file of rows."""
    pytest.importorskip("deltalake" if request.param == "delta" else "pyiceberg")

    def make(name: str = "job") -> TableOutput:
        table = TableOutput(tmp_path / name, request.param)
        (table.folder / "w").mkdir()
        table.write_input("a.parquet", rows_of(0, NUM_ROWS))
        return table

    return make
