"""From broken engines to the rows to blame: simulated runs over engines that break on chosen rows."""

from __future__ import annotations

import pytest

from dspark_batch.batch.faults import MAX_BAD_ROWS, MAX_BAD_ROWS_IN_A_ROW, STEP_ROWS, WITHOUT_A_WORD, FaultLog, Trial


def rounds(log: FaultLog, *, num_rows: int, breaks: set[int], says: str | None = "boom") -> tuple[int, dict[int, str]]:
    """Start engines for one shard until it is committed or the run ends: how many, and the rows that were blamed."""
    for number in range(1, 1000):
        log.begin_engine()
        if log.end_reason is not None:
            return number - 1, {}
        log.note_loaded()
        trial = log.begin("shard")
        if log.end_reason is not None:
            return number, dict(trial.faults)
        if attempt(log, trial, num_rows=num_rows, breaks=breaks - set(trial.faults)):
            log.note_commit("shard")
            return number, dict(trial.faults)
        if says is not None:
            log.note_fault(says, shard="shard")
    raise AssertionError("no end")


def attempt(log: FaultLog, trial: Trial, *, num_rows: int, breaks: set[int]) -> bool:
    if not trial.is_isolated:
        return not breaks
    done: list[int] = []
    for rows in trial.steps(num_rows):
        log.note_step("shard", rows, works=any(row not in trial.faults for row in done))
        if breaks & set(rows):
            return False
        done += rows
    assert sorted(done) == list(range(num_rows)), "every row once"
    return True


@pytest.mark.parametrize("num_rows", [1, 5, STEP_ROWS, STEP_ROWS + 1, 200])
@pytest.mark.parametrize("says", ["boom", None])
def test_the_one_row_that_breaks_engines_is_found(num_rows: int, says: str | None) -> None:
    for row in {0, num_rows // 2, num_rows - 1}:
        num_engines, blamed = rounds(FaultLog(num_engines=1), num_rows=num_rows, breaks={row}, says=says)
        assert blamed == {row: says or WITHOUT_A_WORD}
        assert num_engines <= 5


def test_many_rows_that_break_engines_are_all_found_while_others_get_through() -> None:
    breaks = {3, 4, 40, 41, 97, 199}
    num_engines, blamed = rounds(FaultLog(num_engines=1), num_rows=200, breaks=breaks)
    assert set(blamed) == breaks
    assert num_engines <= 3 + 2 * len(breaks)


def test_a_run_whose_every_row_breaks_the_engine_ends_with_the_fault() -> None:
    log = FaultLog(num_engines=1)
    num_engines, _ = rounds(log, num_rows=200, breaks=set(range(200)))
    assert num_engines == 3 + MAX_BAD_ROWS_IN_A_ROW + 1
    assert log.end_reason == "the engine broke over 3 rows, each by itself; last: boom"


def test_an_engine_that_breaks_from_time_to_time_over_no_row_in_particular_ends_the_run() -> None:
    log = FaultLog(num_engines=1)
    for num_engines in range(1, 200):
        log.begin_engine()
        trial = log.begin("shard")
        if log.end_reason is not None:
            assert num_engines < 2 * MAX_BAD_ROWS
            return
        steps = trial.steps(1000) if trial.is_isolated else ()
        for count, rows in enumerate(rows for rows in steps if set(rows) - set(trial.faults)):
            log.note_step("shard", rows, works=count > 0)
            if count == 20:
                break
    raise AssertionError("no end")


def test_rows_that_break_engines_only_together_are_done_one_at_a_time() -> None:
    log = FaultLog(num_engines=1)
    for _ in range(20):
        log.begin_engine()
        assert log.end_reason is None
        trial = log.begin("shard")
        is_done = trial.is_isolated
        for rows in trial.steps(100) if trial.is_isolated else ():
            log.note_step("shard", rows, works=True)
            if len(rows) > 1:
                is_done = False
                break
        if is_done:
            assert not trial.faults
            return
    raise AssertionError("not done")


def test_a_shard_that_got_through_starts_anew_and_a_done_step_is_not_blamed() -> None:
    log = FaultLog(num_engines=1)
    for _ in range(3):
        trial = log.begin("shard")
    assert trial.is_isolated
    log.note_step("shard", range(1), works=False)
    log.note_step("shard", range(0), works=True)
    assert not log.begin("shard").faults
    log.note_commit("shard")
    assert log.begin("shard") == Trial()
