"""The control state of a Ray run: stop, failures, and the bound on restarts that come to nothing."""

from __future__ import annotations

from dspark_batch.batch.faults import MAX_BAD_ROWS_IN_A_ROW, MAX_FRUITLESS_STARTS
from dspark_batch.batch.live import LiveCounts
from dspark_batch.errors import ConfigError, EngineError, ModelError, Problem
from dspark_batch.ray_data.control import Failure, JobControl


def test_starts_without_a_commit_are_bounded_and_the_last_fault_is_told() -> None:
    control = JobControl(num_actors=1)
    assert all(control.begin_worker() for _ in range(MAX_FRUITLESS_STARTS))
    control.note_fault("device lost", shard="a")
    assert not control.begin_worker()
    failure = control.status().failure
    assert failure is not None
    assert failure.kind == "EngineError"
    assert "device lost" in failure.message
    assert control.begin_shard("a") is None


def test_a_commit_resets_the_bound() -> None:
    control = JobControl(num_actors=2)
    for _ in range(3):
        assert all(control.begin_worker() for _ in range(2 * MAX_FRUITLESS_STARTS))
        control.note_commit("a")
    assert control.status().failure is None


def test_no_shard_begins_after_a_stop() -> None:
    control = JobControl(num_actors=1)
    assert control.begin_shard("a") is not None
    assert control.stop(), "a shard has begun"
    assert control.begin_shard("b") is None
    assert control.status().failure is None


def test_a_stop_tells_that_no_shard_has_begun() -> None:
    control = JobControl(num_actors=1)
    assert control.begin_worker()
    assert not control.status().has_begun
    assert not control.stop()
    assert control.begin_shard("a") is None
    assert not control.stop()


def test_the_first_failure_is_kept() -> None:
    control = JobControl(num_actors=1)
    control.fail(Failure.of(ModelError("no such model")))
    control.fail(Failure.of(EngineError("later")))
    assert control.status().failure == Failure(kind="ModelError", message="no such model")
    assert not control.begin_worker()


def test_live_counts_of_all_processes_are_added_the_last_word_of_each() -> None:
    control = JobControl(num_actors=2)
    for num_samples in (1, 5):
        control.note_live("a", LiveCounts(num_samples=num_samples))
        control.note_live("b", LiveCounts(num_samples=10 * num_samples, num_rounds=3))
    assert control.status().live == LiveCounts(num_samples=55, num_rounds=3)


def test_processes_that_end_while_they_load_are_told_from_those_that_end_later() -> None:
    loading, working = JobControl(num_actors=1), JobControl(num_actors=1)
    for _ in range(MAX_FRUITLESS_STARTS):
        assert loading.begin_worker()
        assert working.begin_worker()
        working.note_loaded()
    messages = []
    for control in (loading, working):
        assert not control.begin_worker()
        failure = control.status().failure
        assert failure is not None
        messages.append(failure.message)
    assert "while it loaded the model" in messages[0]
    assert "without a word" in messages[1]
    assert "loaded" not in messages[1]


def test_the_problems_of_a_config_error_travel_with_it() -> None:
    problem = Problem("engine.max_context", "is more than the model's")
    assert Failure.of(ConfigError([problem])).problems == (problem,)
    assert Failure.of(ModelError("x")).problems == ()


def test_rows_that_break_every_engine_end_the_job() -> None:
    control = JobControl(num_actors=1)
    for row in range(MAX_BAD_ROWS_IN_A_ROW):
        assert control.begin_shard("a") is not None
        control.note_step("a", range(row, row + 1), works=False)
    assert control.begin_shard("a") is None
    failure = control.status().failure
    assert failure is not None
    assert "each by itself" in failure.message
