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
    Pace,
    Progress,
    Work,
    format_duration,
    format_progress,
    progress_report,
)

WORK = Work(num_rows=100, num_shards=10, max_tokens_per_row=1000)
TOTALS = Totals(num_shards=3, num_rows=25, num_failed_rows=2, num_generated_tokens=5000, num_rounds=2000)


def test_the_line_shows_speed_accepted_length_failures_and_time_left() -> None:
    pace = Pace(WORK)
    for num_seen, now_s in ((0, 20.0), (1, 30.0), (2, 40.0)):
        live = LiveCounts(num_generated_tokens=5000 * num_seen, num_samples=25 * num_seen, num_rounds=2000 * num_seen)
        progress = Progress.of(WORK, Totals(num_shards=3, num_failed_rows=2), live)
        pace.note(progress, now_s=now_s)
    line = format_progress(WORK, progress, pace)
    assert line == "shards 3/10 · 500 tokens/s · accepted length 2.50 · failed 2 · left 20s"


def test_the_line_before_the_first_row_promises_nothing() -> None:
    assert format_progress(WORK, Progress.of(WORK, Totals(), LiveCounts()), Pace(WORK)) == "shards 0/10 · failed 0"


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
    work = Work(num_rows=100, num_shards=1, num_samples_per_row=2, max_tokens_per_row=9)
    live = LiveCounts(num_samples=51, num_generated_tokens=900, num_rounds=300)
    progress = Progress.of(work, Totals(), live + LiveCounts(num_samples=10, num_generated_tokens=100, num_rounds=100))
    line = format_progress(work, progress, Pace(WORK))
    assert progress.num_rows == 30
    assert line == "shards 0/1 · accepted length 2.50 · failed 0"


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


def test_the_time_that_a_model_takes_to_load_slows_nothing() -> None:
    stream = io.StringIO()
    now = 0.0
    with LineReport(WORK, stream=stream, clock=lambda: now) as report:
        for now in range(100, 121):
            seconds = now - 100
            report.update(Totals(), LiveCounts(num_generated_tokens=40 * seconds, num_samples=max(0, seconds - 10)))
    assert (
        stream.getvalue().splitlines()[-1] == "rows 10/100 (10 %) · shards 0/10 · 40 tokens/s · failed 0 · left 1m 30s"
    )


def test_rows_are_not_taken_to_be_longer_than_they_may_be() -> None:
    work = Work(num_rows=10, num_shards=1, max_tokens_per_row=50)
    pace = Pace(work)
    for now_s, num_samples in ((0.0, 0), (2.0, 1), (4.0, 2)):
        progress = Progress.of(
            work, Totals(), LiveCounts(num_samples=num_samples, num_generated_tokens=int(100 * now_s))
        )
        pace.note(progress, now_s=now_s)
    assert pace.left_s(progress) == 1.0


def test_where_nothing_is_generated_the_speed_is_in_rows() -> None:
    work = Work(num_rows=100, num_shards=1, max_tokens_per_row=None)
    pace = Pace(work)
    for now_s, num_samples in ((0.0, 1), (2.0, 16), (4.0, 20)):
        progress = Progress.of(work, Totals(), LiveCounts(num_samples=num_samples, num_generated_tokens=num_samples))
        pace.note(progress, now_s=now_s)
    assert format_progress(work, progress, pace) == "shards 0/1 · 4.8 rows/s · failed 0 · left 17s"


def test_one_look_gives_no_rate() -> None:
    stream = io.StringIO()
    with LineReport(WORK, stream=stream) as report:
        report.update(TOTALS, LiveCounts())
    assert stream.getvalue() == "rows 25/100 (25 %) · shards 3/10 · accepted length 2.50 · failed 2\n"
