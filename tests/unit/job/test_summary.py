"""What is shown of rows when a run ends."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dspark_batch.job.summary import MAX_CELL_CHARS, format_rows

ERROR = {"code": "prompt_too_long", "message": "5000 tokens are more than " + "x" * 100, "retryable": False}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('{"product": "tea"}', '{"product": "tea"}'),
        ("two\nlines and \x1b[31mred", "two\\nlines and \\x1b[31mred"),
        ("ü" * 150, "ü" * (MAX_CELL_CHARS - 1) + "…"),
        (["a", "b"], '["a", "b"]'),
        (None, "None"),
        (ERROR, f"prompt_too_long: {ERROR['message']}"),
    ],
)
def test_values_are_shown_plainly_on_one_line(value: object, shown: str) -> None:
    assert format_rows(pa.table({"v": [value]}), columns=["v"]) == [f"  v={shown}"]
