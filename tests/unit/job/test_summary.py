"""What is shown of rows when a run ends."""

from __future__ import annotations

from typing import cast

import pyarrow as pa
import pytest

from dspark_batch.job.drive import Ending
from dspark_batch.job.outcome import Totals
from dspark_batch.job.prepare import PreparedRun
from dspark_batch.job.summary import MAX_CELL_CHARS, Finished, format_rows, work_done

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


@pytest.mark.parametrize(
    ("loaded_s", "shown"),
    [
        (111.0, "120 tokens in 14s, 11s of them until an engine was loaded (40 tokens/s from then on)"),
        (None, "120 tokens in 14s (9 tokens/s)"),
        (50.0, "120 tokens in 14s (9 tokens/s)"),
        (100.2, "120 tokens in 14s (9 tokens/s)"),
        (300.0, "120 tokens in 14s (9 tokens/s)"),
    ],
)
def test_the_rate_is_that_of_the_time_after_loading(loaded_s: float | None, shown: str) -> None:
    done = Totals(num_rows=6, num_shards=2, num_generated_tokens=120)
    finished = Finished(
        run=cast(PreparedRun, None), ending=Ending.DONE, done=done, whole=done, elapsed_s=14.0, begin_s=100.0
    )
    assert work_done(finished, loaded_s) == [f"this run: 6 rows in 2 shards, {shown}"]
