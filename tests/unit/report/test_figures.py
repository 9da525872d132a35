"""The numbers of a report, from engines whose work is known."""

from __future__ import annotations

import pytest

from dspark_batch.report.figures import MAX_BINS, Cost, acceptance, series_of, spans_of


def test_the_cost_is_the_time_of_all_engines_whether_they_ran_side_by_side_or_one_after_the_other(make_engine) -> None:
    engines = [make_engine(0), make_engine(5), make_engine(90_000, work_s=3380, run_id="r2")]
    cost = Cost.of(engines, num_rows=2_000, num_tokens=500_000, price=2.5)
    assert cost.engine_s == 110 + 110 + 3390
    assert cost.load_s == 30
    assert cost.per_million_rows(cost.engine_hours) == pytest.approx(3610 / 3600 * 500)
    assert cost.per_million_tokens(cost.engine_hours) == pytest.approx(3610 / 3600 * 2)
    nothing = Cost.of([], num_rows=0, num_tokens=0)
    assert (nothing.engine_s, nothing.per_million_rows(1.0), nothing.per_million_tokens(1.0)) == (0, None, None)


def test_a_pause_between_two_starts_is_no_time_of_the_run_and_a_short_one_is(make_engine) -> None:
    night, again, next_night = make_engine(0), make_engine(130), make_engine(86_400)
    spans = spans_of([night, again, next_night])
    assert [span.end_s - span.begin_s for span in spans] == [240, 110]
    inside = make_engine(20, work_s=10)
    assert spans_of([night, inside]) == spans_of([night])


def test_a_series_holds_all_that_was_done_and_shows_it_where_it_was_done(make_engine) -> None:
    engines = [make_engine(0), make_engine(50), make_engine(86_400, num_steps=500)]
    series = series_of(engines)
    assert series is not None
    assert series.total_s == pytest.approx(160 + 110)
    assert len(series.num_tokens) == MAX_BINS
    assert sum(series.num_tokens) == pytest.approx(12_000 + 12_000 + 6_000)
    assert sum(series.num_engines) * series.bin_s == pytest.approx(330)
    assert max(series.num_engines) == pytest.approx(2)
    ((at_s, since),) = series.cuts()
    assert at_s == pytest.approx(160)
    assert since == "2026-05-29 20:26"

    def at(values, axis_s):
        return values[int(axis_s / series.bin_s)]

    assert at(series.tokens_per_s, 5) == 0
    assert at(series.tokens_per_s, 30) == pytest.approx(120)
    assert at(series.tokens_per_s, 90) == pytest.approx(240)
    assert at(series.tokens_per_s, 240) == pytest.approx(60)
    assert at(series.batch_size, 5) is None
    assert at(series.batch_size, 90) == pytest.approx(4)
    assert at(series.draft_length, 90) == pytest.approx(3)
    assert at(series.accepted_per_round, 240) == pytest.approx(2)


def test_without_engines_or_time_there_is_no_series(make_engine) -> None:
    assert series_of([]) is None
    assert series_of([make_engine(0, load_s=0, work_s=0)]) is None


def test_acceptance_adds_up_over_engines_with_drafts_of_several_lengths(make_engine) -> None:
    from dataclasses import replace

    short = replace(make_engine(0), by_position=((10, 5),))
    assert acceptance([make_engine(0, num_steps=10), short]) == [(50, 45), (40, 40), (40, 0)]
    assert acceptance([]) == []
