"""Progress lines: their figures and how often they come."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dspark_batch.batch.live import LiveCounts
from dspark_batch.job.outcome import Totals
from dspark_batch.job.progress import (
    BarReport,
    LineReport,
    Progress,
    Work,
    format_duration,
    format_progress,
    progress_report,
)

WORK = Work(num_rows=100, num_shards=10)
TOTALS = Totals(num_shards=3, num_rows=25, num_failed_rows=2, num_generated_tokens=5000, num_rounds=2000)


def test_the_line_shows_speed_accepted_length_failures_and_time_left() -> None:
    line = format_progress(WORK, Progress.of(WORK, TOTALS, LiveCounts()), elapsed_s=10.0)
    assert line == "shards 3/10 · 500 tokens/s · accepted length 2.50 · failed 2 · left 30s"


def test_the_line_before_the_first_row_promises_nothing() -> None:
    assert (
        format_progress(WORK, Progress.of(WORK, Totals(), LiveCounts()), elapsed_s=3.0)
        == "shards 0/10 · 0 tokens/s · failed 0"
    )


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (185, "3m 05s"), (7620, "2h 07m"), (-1, "0s")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_come_at_most_every_interval_and_the_last_is_never_lost() -> None:
    now = 0.0
    stream = io.StringIO()
    with LineReport(WORK, stream=stream, interval_s=5.0, clock=lambda: now) as report:
        for now in (1.0, 4.9, 5.0, 6.0, 9.9, 10.0, 11.0):
            report.update(TOTALS, LiveCounts(num_generated_tokens=int(10_000 * now)))
    assert len(stream.getvalue().splitlines()) == 3
    assert stream.getvalue().startswith("rows 25/100 (25 %) · shards 3/10")


def test_lines_are_rare_while_nothing_moves_and_in_long_runs() -> None:
    stream = io.StringIO()
    now = 0.0
    with LineReport(WORK, stream=stream, interval_s=5.0, clock=lambda: now) as report:
        for now in range(61):  # noqa: B007 - the clock reads it
            report.update(Totals(), LiveCounts())
    assert len(stream.getvalue().splitlines()) == 1 + 1
    stream = io.StringIO()
    now = 0.0
    with LineReport(WORK, stream=stream, interval_s=5.0, clock=lambda: now) as report:
        for now in range(8 * 3600):
            report.update(Totals(), LiveCounts(num_generated_tokens=now))
    assert 480 < len(stream.getvalue().splitlines()) < 700


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    assert isinstance(progress_report(WORK, stream=io.StringIO()), LineReport)


def test_a_bar_shows_the_same_figures() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with BarReport(WORK, console=console) as report:
        report.update(TOTALS, LiveCounts())
        report.say("hello [1]")
    assert isinstance(console.file, io.StringIO)
    assert "accepted length 2.50" in console.file.getvalue()
    assert "hello [1]" in console.file.getvalue()


def test_live_counts_move_the_line_while_a_long_shard_decodes() -> None:
    work = Work(num_rows=100, num_shards=1, num_samples_per_row=2)
    live = LiveCounts(num_samples=51, num_generated_tokens=900, num_rounds=300)
    progress = Progress.of(work, Totals(), live + LiveCounts(num_samples=10, num_generated_tokens=100, num_rounds=100))
    line = format_progress(work, progress, elapsed_s=10.0)
    assert progress.num_rows == 30
    assert line == "shards 0/1 · 100 tokens/s · accepted length 2.50 · failed 0 · left 23s"


def test_rows_with_copied_results_count_once_they_are_committed() -> None:
    live = LiveCounts(num_samples=7, num_generated_tokens=70, num_rounds=7)
    assert Progress.of(WORK, TOTALS, live).num_rows == 25
    assert Progress.of(WORK, TOTALS, LiveCounts(num_samples=1000)).num_rows == 100


def test_rows_that_a_filter_drops_are_out_of_the_total_once_all_shards_are_committed() -> None:
    stream = io.StringIO()
    with LineReport(WORK, stream=stream) as report:
        report.update(Totals(num_shards=10, num_rows=54), LiveCounts(num_samples=54))
    assert stream.getvalue().startswith("rows 54/54 (100 %) · shards 10/10")
    assert stream.getvalue().rstrip().endswith("left 0s")
