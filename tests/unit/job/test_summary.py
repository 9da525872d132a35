"""What is shown of rows when a run ends."""

from __future__ import annotations

from types import SimpleNamespace
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
        (None, "120 tokens in 14s (8.6 tokens/s)"),
        (50.0, "120 tokens in 14s (8.6 tokens/s)"),
        (100.2, "120 tokens in 14s (8.6 tokens/s)"),
        (300.0, "120 tokens in 14s (8.6 tokens/s)"),
    ],
)
def test_the_rate_is_that_of_the_time_after_loading(loaded_s: float | None, shown: str) -> None:
    assert work_done(finished(max_tokens_per_row=64), loaded_s) == [f"this run: 6 rows in 2 shards, {shown}"]


def test_where_nothing_is_generated_the_rate_is_in_rows() -> None:
    line = "this run: 6 rows in 2 shards in 14s, 11s of them until an engine was loaded (2.0 rows/s from then on)"
    assert work_done(finished(max_tokens_per_row=None), 111.0) == [line]


def finished(*, max_tokens_per_row: int | None) -> Finished:
    run = cast(PreparedRun, SimpleNamespace(config=SimpleNamespace(max_tokens_per_row=max_tokens_per_row)))
    done = Totals(num_rows=6, num_shards=2, num_generated_tokens=120)
    return Finished(run=run, ending=Ending.DONE, done=done, whole=done, elapsed_s=14.0, begin_s=100.0)
