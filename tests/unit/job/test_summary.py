from __future__ import annotations

import pyarrow as pa

from dspark_batch.job.summary import format_rows


def test_rows_are_shown_also_where_a_value_is_not_utf8():
    raw = pa.array([b"gr\xc3\xbcn", b"l\xe9l\xe9", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    rows = format_rows(pa.table({"text": text, "n": [1, 2, 3]}), columns=["n", "text", "n"])
    assert rows == ['  n=1 | text="grün"', '  n=2 | text="l�l�"', "  n=3 | text=None"]
