"""Progress lines: their figures and how often they come."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dspark_batch.job.outcome import Totals
from dspark_batch.job.progress import BarReport, LineReport, Work, format_duration, format_progress, progress_report

WORK = Work(num_rows=100, num_shards=10)
TOTALS = Totals(num_shards=3, num_rows=25, num_failed_rows=2, num_generated_tokens=5000, num_rounds=2000)


def test_the_line_shows_speed_accepted_length_failures_and_time_left() -> None:
    line = format_progress(WORK, TOTALS, elapsed_s=10.0)
    assert line == "shards 3/10 · 500 tokens/s · accepted length 2.50 · failed 2 · left 30s"


def test_the_line_before_the_first_row_promises_nothing() -> None:
    assert format_progress(WORK, Totals(), elapsed_s=3.0) == "shards 0/10 · 0 tokens/s · failed 0"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (185, "3m 05s"), (7620, "2h 07m"), (-1, "0s")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_come_at_most_every_interval_and_the_last_is_never_lost() -> None:
    now = 0.0
    stream = io.StringIO()
    with LineReport(WORK, stream=stream, interval_s=5.0, clock=lambda: now) as report:
        for now in (1.0, 4.9, 5.0, 6.0, 9.9, 10.0, 11.0):  # noqa: B007 - the clock reads it
            report.update(TOTALS)
    assert len(stream.getvalue().splitlines()) == 3
    assert stream.getvalue().startswith("rows 25/100 (25 %) · shards 3/10")


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    assert isinstance(progress_report(WORK, stream=io.StringIO()), LineReport)


def test_a_bar_shows_the_same_figures() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with BarReport(WORK, console=console) as report:
        report.update(TOTALS)
        report.say("hello [1]")
    assert isinstance(console.file, io.StringIO)
    assert "accepted length 2.50" in console.file.getvalue()
    assert "hello [1]" in console.file.getvalue()
