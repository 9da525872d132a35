from __future__ import annotations

import datetime
from decimal import Decimal

import pyarrow as pa
import pytest

from dspark_batch.batch.rows import check_id_column, row_ids


def ids_of(array: pa.Array) -> tuple[str, ...]:
    return row_ids(pa.table({"id": array}), id_column="id", relative_file="a/f.parquet", row_index=[10, 11])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["x", "y"]), ("x", "y")),
        (pa.array([1, -2]), ("1", "-2")),
        (pa.array([Decimal("1.50"), Decimal("2.00")]), ("1.50", "2.00")),
        (pa.array([datetime.date(2026, 1, 2), datetime.date(2026, 1, 3)]), ("2026-01-02", "2026-01-03")),
        (pa.array(["x", "x"]).dictionary_encode(), ("x", "x")),
        (pa.array(["x", None]), ("x", "a/f.parquet#11")),
        (pa.array([None, None]), ("a/f.parquet#10", "a/f.parquet#11")),
    ],
)
def test_ids_are_the_columns_text_or_file_and_row_where_null(array, expected):
    assert ids_of(array) == expected


def test_without_an_id_column_file_and_row_identify():
    table = pa.table({"text": ["a", "b"]})
    assert row_ids(table, id_column=None, relative_file="f.jsonl", row_index=[0, 5]) == ("f.jsonl#0", "f.jsonl#5")


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.binary(), pa.struct([("a", pa.int8())])])
def test_an_id_column_without_a_text_form_is_refused(kind):
    assert "ids must be" in check_id_column("id", schema=pa.schema([("id", kind)]))[0].message


def test_a_missing_id_column_is_refused_with_the_available_ones():
    assert "text" in check_id_column("id", schema=pa.schema([("text", pa.string())]))[0].message
