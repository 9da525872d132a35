"""Tables of measured costs as functions: between points, between rows, between contexts, and beyond."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.scheduling.cost_table import CostSurface, CostTable, DraftSample, StepSample, interpolate, monotone


def knee(tokens: int, rows: int, context: int) -> float:
    """A CPU: weights are read once, then arithmetic; keys are read once per row."""
    return max(0.010, 0.0005 * tokens) + 0.000001 * rows * context


def stairs(tokens: int, rows: int, context: int) -> float:
    """A GPU: whole tiles of 16 tokens."""
    return 0.004 + 0.001 * math.ceil(tokens / 16) + 0.0000001 * rows * context


def surface(table: CostTable) -> CostSurface:
    return CostSurface(table.steps)


def seconds(table: CostTable, tokens: float, rows: float, context: float = 128) -> float:
    return float(surface(table).seconds(np.array([float(tokens)]), num_rows=rows, context_tokens=context)[0])


ROWS = (1, 4, 16, 64)
EVERY_TILE = (1, 2, 3, 4, 5, 8, 9, 12, 13, 16)


@pytest.mark.parametrize("cost", [knee, stairs])
def test_measured_points_are_given_back(cost: object) -> None:
    table = CostTable.from_function(cost, rows=ROWS, contexts=(128, 2048))  # type: ignore[arg-type]
    for step in table.steps:
        at = seconds(table, step.num_tokens, step.num_rows, step.context_tokens)
        assert at == pytest.approx(step.seconds, rel=1e-9)


def test_a_knee_is_met_between_the_measured_rows_and_sizes() -> None:
    table = CostTable.from_function(knee, rows=ROWS, contexts=(128, 2048))
    for rows, tokens in ((2, 7), (6, 40), (10, 10), (33, 100), (50, 300)):
        assert seconds(table, tokens, rows) == pytest.approx(knee(tokens, rows, 128), rel=0.12)


def test_eight_tokens_of_one_row_are_cheaper_than_one_of_each_of_eight() -> None:
    def by_keys(tokens: int, rows: int, context: int) -> float:
        return 0.001 * tokens + 0.00001 * rows * context

    table = CostTable.from_function(by_keys, rows=(1, 4, 16), contexts=(128, 1024))
    one, eight = seconds(table, 8, 1, 1024), seconds(table, 8, 8, 1024)
    assert one == pytest.approx(by_keys(8, 1, 1024), rel=0.01)
    assert eight == pytest.approx(by_keys(8, 8, 1024), rel=0.05)
    assert eight > 4 * one


def test_stairs_stay_where_they_are_between_measured_rows() -> None:
    table = CostTable.from_function(stairs, rows=(1, 8, 16), tokens_per_row=EVERY_TILE)
    at = surface(table).seconds(np.arange(10.0, 65.0), num_rows=10, context_tokens=128)
    jumps = 10 + np.flatnonzero(np.diff(at) > 0.0005) + 1
    assert set(jumps) <= {16, 17, 32, 33, 48, 49, 64}


def test_contexts_between_and_beyond_are_in_proportion() -> None:
    table = CostTable.from_function(knee, rows=ROWS, contexts=(128, 2048))
    for context in (128, 1000, 2048, 8192):
        assert seconds(table, 32, 16, context) == pytest.approx(knee(32, 16, context), rel=0.05)
    assert seconds(table, 32, 16, 0) == seconds(table, 32, 16, 128)


def test_a_context_that_was_measured_for_few_rows_counts_in_proportion_for_more() -> None:
    steps = CostTable.from_function(knee, rows=ROWS, contexts=(128,)).steps
    few = CostTable.from_function(knee, rows=(1, 4), tokens_per_row=(1, 4), contexts=(2048,)).steps
    table = CostTable(steps + few)
    assert seconds(table, 64, 64, 2048) == pytest.approx(knee(64, 64, 2048), rel=0.1)


def test_sizes_beyond_the_measured_ones_go_on_with_the_last_slope() -> None:
    table = CostTable.from_function(knee, rows=(1, 4, 16), tokens_per_row=(1, 2, 4, 8))
    assert seconds(table, 512, 16) == pytest.approx(knee(512, 16, 128), rel=0.15)
    assert seconds(CostTable((StepSample(0, 1, 1, 0.5),)), 8, 1) == pytest.approx(4.0)


def test_a_steep_curve_of_few_rows_makes_no_step_of_more_rows_cost_less_than_nothing() -> None:
    steps = [StepSample(0, 1, 6, 0.25), StepSample(0, 1, 7, 1.0), StepSample(0, 16, 16, 1.0)]
    surface = CostSurface(steps)
    measured = np.arange(2.0, 17.0)
    at, alone = (surface.seconds(measured, num_rows=rows, context_tokens=0.0) for rows in (2, 1))
    assert (at >= alone - 1e-12).all()
    assert at[0] == 0.25


@given(
    data=st.lists(
        st.tuples(
            st.sampled_from([0, 128, 999]), st.sampled_from([1, 3, 7, 16]), st.integers(1, 9), st.floats(1e-4, 1)
        ),
        min_size=1,
        max_size=40,
    ),
    rows=st.integers(1, 40),
    context=st.floats(0, 3000),
)
@settings(max_examples=80, deadline=None)
def test_any_measurement_gives_a_cost_that_never_falls_with_more_tokens(
    data: list[tuple[int, int, int, float]], rows: int, context: float
) -> None:
    steps = {(c, r, r * k): StepSample(c, r, r * k, s) for c, r, k, s in data}
    at = CostSurface(steps.values()).seconds(np.arange(rows, 600.0), num_rows=rows, context_tokens=context)
    assert (at > 0).all()
    assert np.isfinite(at).all()
    assert (np.diff(at) >= -1e-9 * at[:-1]).all()


def test_json_and_back_is_the_same_table() -> None:
    table = CostTable(
        tuple(sorted(CostTable.from_function(knee, rows=ROWS, contexts=(128, 512)).steps)),
        (DraftSample(1, 1, 0.001), DraftSample(4, 7, 0.002)),
    )
    assert CostTable.from_dict(table.as_dict()) == table
    assert table.most_rows == 64


@pytest.mark.parametrize(
    "values",
    [
        {"steps": [], "drafts": []},
        {"steps": [[128, 4, 2, 0.1]], "drafts": []},
        {"steps": [[128, 1, 2, 0.0]], "drafts": []},
        {"steps": [[128, 1, 2, float("nan")]], "drafts": []},
        {"steps": [[128, 1, 2, 0.1]], "drafts": [[0, 1, 0.1]]},
    ],
)
def test_figures_that_cannot_be_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"cost table|measured"):
        CostTable.from_dict(values)


def test_monotone_pools_by_weight_and_keeps_what_rises() -> None:
    ones = np.ones(4)
    assert monotone(np.array([1.0, 2.0, 3.0, 4.0]), ones).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert monotone(np.array([1.0, 3.0, 1.0, 4.0]), np.array([1.0, 3.0, 1.0, 1.0])).tolist() == [1.0, 2.5, 2.5, 4.0]


@pytest.mark.parametrize("cost", [knee, stairs])
def test_the_seconds_of_one_step_are_those_of_many(cost: object) -> None:
    table = CostTable.from_function(cost, rows=ROWS, contexts=(128, 512, 2048))  # type: ignore[arg-type]
    costs = surface(table)
    for num_rows in (1, 3, 16, 50, 200):
        for context in (0, 128, 300.5, 1000, 5000):
            tokens = np.array([num_rows + extra for extra in (0.0, 0.5, 1.0, 7.0, 160.0, 3000.0)])
            many = [
                float(costs.seconds(tokens[i : i + 1], num_rows=num_rows, context_tokens=context)[0]) for i in range(6)
            ]
            one = [costs.at(at, num_rows=num_rows, context_tokens=context) for at in tokens.tolist()]
            assert one == pytest.approx(many, rel=1e-12)


def test_one_number_is_interpolated_as_numpy_does() -> None:
    at, values = [1.0, 2.0, 2.0, 5.0], [3.0, 4.0, 6.0, 1.0]
    for x in (0.0, 1.0, 1.5, 2.0, 3.3, 5.0, 9.0):
        assert interpolate(x, at, values) == pytest.approx(float(np.interp(x, at, values)))
    assert interpolate(7.0, [2.0], [4.0]) == 4.0
