"""Columns with strings that are not UTF-8, of every type that holds strings."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.utf8 import valid_utf8

RAW = pa.array([b"a", b"caf\xe9", None, b"c\xe8!"], pa.binary())
BAD = RAW.view(pa.string())
GOOD = ["a", "caf\ufffd", None, "c\ufffd!"]
OFFSETS = pa.array([0, 2, 2, 3, 4], pa.int32())
NULLS = pa.array([False, True, False, False])
LISTS = [["a", "caf\ufffd"], None, [None], ["c\ufffd!"]]

COLUMNS = {
    "string": (BAD, GOOD),
    "large": (RAW.cast(pa.large_binary()).view(pa.large_string()), GOOD),
    "view": (RAW.cast(pa.binary_view()).view(pa.string_view()), GOOD),
    "json": (pa.ExtensionArray.from_storage(pa.json_(pa.string()), BAD), GOOD),
    "dictionary": (
        pa.DictionaryArray.from_arrays(
            pa.array([0, 1, None, 0], pa.int8()), pa.array([b"\xe9", b"\xe8"]).view("string")
        ),
        ["\ufffd", "\ufffd", None, "\ufffd"],
    ),
    "list": (pa.ListArray.from_arrays(OFFSETS, BAD, mask=NULLS), LISTS),
    "pairs": (pa.FixedSizeListArray.from_arrays(BAD, 2), [GOOD[:2], GOOD[2:]]),
    "struct": (
        pa.StructArray.from_arrays([BAD, pa.array([1, 2, 3, 4])], names=["x", "y"], mask=NULLS),
        [{"x": "a", "y": 1}, None, {"x": None, "y": 3}, {"x": "c\ufffd!", "y": 4}],
    ),
    "nested": (
        pa.LargeListArray.from_arrays(pa.array([0, 3], pa.int64()), pa.ListArray.from_arrays(OFFSETS, BAD, mask=NULLS)),
        [LISTS[:3]],
    ),
    "map": (
        pa.MapArray.from_arrays(pa.array([0, 1, 2]), pa.array([b"k\xff", b"l"]).view("string"), BAD.slice(1, 2)),
        [[("k\ufffd", "caf\ufffd")], [("l", None)]],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_invalid_bytes_become_the_replacement_character(name: str) -> None:
    array, expected = COLUMNS[name]
    column = pa.chunked_array([array, array.slice(1), array.slice(0, 0)])
    with pytest.raises(pa.ArrowInvalid):
        column.validate(full=True)
    made = valid_utf8(column)
    made.validate(full=True)
    assert made.type == column.type
    assert made.to_pylist() == expected + expected[1:]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"c": made}), sink)
    assert pq.read_table(pa.BufferReader(sink.getvalue()))["c"].to_pylist() == made.to_pylist()


def test_valid_columns_are_not_copied() -> None:
    column = pa.chunked_array([pa.array(["größe", None]), pa.array(["b"])])
    assert valid_utf8(column) is column
