"""Which sizes are measured, how noise is met, and that stairs are found; on a made-up clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from dspark_batch.scheduling.cost_table import CostSurface, CostTable
from dspark_batch.scheduling.profiler import Grid, measure_costs


class Machine:
    """step_s: (context, rows, tokens) -> seconds. Every call moves the clock; some calls are disturbed."""

    def __init__(self, step_s: Callable[[int, int, int], float | None], *, disturbed: float = 0.0) -> None:
        self._step_s = step_s
        self._disturbed = disturbed
        self._rng = random.Random(0)
        self.now_s = 0.0
        self.calls: list[tuple[int, int, int]] = []

    def step(self, context: int, rows: int, tokens: int) -> float | None:
        self.calls.append((context, rows, tokens))
        seconds = self._step_s(context, rows, tokens)
        if seconds is None:
            return None
        if self._rng.random() < self._disturbed:
            seconds *= 5.0
        self.now_s += seconds
        return seconds

    def clock(self) -> float:
        return self.now_s


def knee(context: int, rows: int, tokens: int) -> float:
    return max(0.01, 0.0005 * tokens) + 1e-6 * rows * context


def stairs(context: int, rows: int, tokens: int) -> float:
    return 0.004 * math.ceil(tokens / 24)


def profile(machine: Machine, grid: Grid, *, budget_s: float = 4.0) -> CostTable | None:
    return measure_costs(grid, time_step=machine.step, budget_s=budget_s, clock=machine.clock)


GRID = Grid.for_engine(most_rows=64, longest_draft=7, max_context=2048)


def test_the_grid_covers_the_rows_the_draft_lengths_and_the_contexts_of_the_engine() -> None:
    assert GRID.rows == (1, 4, 16, 64)
    assert GRID.tokens_per_row == (1, 2, 3, 4, 8)
    assert GRID.contexts == (128, 1024)
    assert GRID.draft_lengths == ()
    small = Grid.for_engine(most_rows=6, longest_draft=1, max_context=64, draft_lengths=(1,))
    assert small.rows == (1, 4, 6)
    assert small.tokens_per_row == (1, 2)
    assert small.contexts == (31,)
    assert small.draft_lengths == (1,)


@pytest.mark.parametrize("disturbed", [0.0, 0.15])
def test_a_knee_is_measured_within_the_budget_even_on_a_disturbed_machine(disturbed: float) -> None:
    machine = Machine(knee, disturbed=disturbed)
    table = profile(machine, GRID)
    assert table is not None
    assert machine.now_s < 10.0
    surface = CostSurface(table.steps)
    for rows, tokens in ((1, 5), (8, 30), (32, 64), (64, 256)):
        found = surface.seconds(np.array([float(tokens)]), num_rows=rows, context_tokens=128)[0]
        assert found == pytest.approx(knee(128, rows, tokens), rel=0.2)


def test_the_edges_of_stairs_are_found_between_the_sizes_of_the_grid() -> None:
    table = profile(Machine(stairs), GRID)
    assert table is not None
    surface = CostSurface(table.steps)
    for tokens, seconds in ((20, 0.004), (24, 0.004), (25, 0.008), (40, 0.008), (48, 0.008)):
        assert surface.seconds(np.array([float(tokens)]), num_rows=16, context_tokens=128)[0] == pytest.approx(
            seconds, rel=0.1
        )


def test_sizes_that_would_take_too_long_are_left_to_extrapolation() -> None:
    machine = Machine(lambda context, rows, tokens: 0.01 * tokens)
    table = profile(machine, GRID)
    assert table is not None
    assert max(tokens for _, _, tokens in machine.calls) <= 128
    assert machine.now_s < 20.0


def test_what_does_not_fit_is_left_out_and_nothing_at_all_is_no_table() -> None:
    table = profile(Machine(lambda context, rows, tokens: None if rows * context > 4000 else 0.01), GRID)
    assert table is not None
    assert {(s.context_tokens, s.num_rows) for s in table.steps} == {(128, 1), (128, 4), (128, 16), (1024, 1)}
    assert profile(Machine(lambda context, rows, tokens: None), GRID) is None


def test_a_spent_budget_ends_after_two_passes_and_a_fast_machine_gets_five() -> None:
    for step_s, passes in ((0.001, 5), (0.3, 2)):
        machine = Machine(lambda context, rows, tokens, s=step_s: s)  # type: ignore[misc]
        profile(machine, GRID)
        assert machine.calls.count((1024, 4, 4)) == passes


def test_drafts_are_measured_by_rows_at_one_token_and_in_full() -> None:
    grid = Grid.for_engine(most_rows=16, longest_draft=7, max_context=2048, draft_lengths=(1, 7))
    machine = Machine(knee)
    table = measure_costs(
        grid,
        time_step=machine.step,
        time_draft=lambda rows, tokens: 0.001 * rows + 0.0001 * tokens,
        clock=machine.clock,
    )
    assert table is not None
    assert [(d.num_rows, d.num_tokens) for d in table.drafts] == [(r, k) for r in (1, 4, 16) for k in (1, 7)]
