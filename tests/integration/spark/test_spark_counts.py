"""How often rows are generated and engines loaded, counted through files; and what happens when processes die."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from dspark_batch.spark import generate, generate_udf, register
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.spark_rows import job_values

pytestmark = pytest.mark.spark

NUM_ROWS = 40


@pytest.fixture(scope="module")
def prompts(spark):
    frame = spark.createDataFrame([(row, f"prompt {row}") for row in range(NUM_ROWS)], "id long, body string")
    frame = frame.repartition(2).cache()
    assert frame.count() == NUM_ROWS
    return frame


def generated(prompts, engine: EngineFolder, **spark_settings):
    config = {**job_values(engine.path, temperature=0.5), "spark": {"rows_per_chunk": 5, **spark_settings}}
    return generate(prompts, config, prompt="body", id="id")


def with_function(prompts, engine: EngineFolder):
    return prompts.withColumn("r", generate_udf(job_values(engine.path))("body", "id"))


QUERIES = {
    "select": lambda frame: frame.select("id", "text"),
    "filter on the result": lambda frame: frame.filter("finish_reason != 'error' AND length(text) > 0"),
    "join after": lambda frame: frame.join(frame.sparkSession.range(NUM_ROWS).toDF("id"), "id"),
}
STRUCT_QUERIES = {
    "select": lambda frame: frame.select("id", "r"),
    "filter on the result": lambda frame: frame.filter("r.error IS NULL AND length(r.text) > 0").select("id", "r.text"),
    "struct expansion": lambda frame: frame.select("id", "r.*"),
    "join after": lambda frame: frame.join(frame.sparkSession.range(NUM_ROWS).toDF("id"), "id"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_generate_generates_every_row_once(prompts, engine, name) -> None:
    assert len(QUERIES[name](generated(prompts, engine)).collect()) == NUM_ROWS
    assert sorted(engine.rows()) == sorted(f"prompt {row}" for row in range(NUM_ROWS))


@pytest.mark.parametrize("name", STRUCT_QUERIES)
def test_the_column_function_generates_every_row_once(prompts, engine, name) -> None:
    assert len(STRUCT_QUERIES[name](with_function(prompts, engine)).collect()) == NUM_ROWS
    assert len(engine.rows()) == NUM_ROWS


def test_order_by_generates_twice_unless_the_result_is_persisted_first(prompts, engine) -> None:
    assert len(generated(prompts, engine).orderBy("text").collect()) == NUM_ROWS
    assert len(engine.rows()) == 2 * NUM_ROWS
    engine.forget()
    kept = generated(prompts, engine).persist()
    try:
        assert kept.count() == NUM_ROWS
        assert len(kept.orderBy("text").collect()) == NUM_ROWS
        assert len(engine.rows()) == NUM_ROWS
    finally:
        kept.unpersist()


def test_a_filter_before_costs_nothing_and_one_behind_costs_every_row(prompts, engine) -> None:
    assert with_function(prompts.filter("id < 10"), engine).collect()
    assert len(engine.rows()) == 10
    engine.forget()
    assert len(with_function(prompts, engine).filter("id < 10").collect()) == 10
    assert len(engine.rows()) == NUM_ROWS


def test_null_prompts_give_null_without_generation(spark, engine) -> None:
    frame = spark.createDataFrame([(1, None), (2, "x"), (3, None)], "id long, body string").coalesce(1)
    assert [row.r is None for row in with_function(frame, engine).collect()] == [True, False, True]
    assert engine.rows() == ["x"]
    engine.forget()
    rows = generated(frame, engine).collect()
    assert [(row.text is None, row.error and row.error.code) for row in rows] == [
        (True, "null_prompt"),
        (False, None),
        (True, "null_prompt"),
    ]
    assert engine.rows() == ["x"]


def test_sql_arguments_replace_the_configs_sampling_and_bad_ones_give_error_rows(spark, prompts, engine) -> None:
    register(spark, "counted_generate", job_values(engine.path))
    prompts.createOrReplaceTempView("prompts")
    rows = spark.sql(
        "SELECT id, counted_generate(body, max_tokens => 1 + CAST(id % 2 AS INT), "
        "temperature => IF(id = 7, -1.0D, 0.0D)) AS r FROM prompts"
    ).collect()
    assert all(row.r.num_generated_tokens <= 1 + row.id % 2 for row in rows)
    assert {row.id: row.r.error.code for row in rows if row.r.error} == {7: "invalid_sampling"}
    assert len(engine.rows()) == NUM_ROWS - 1


def test_samples_of_a_row_stand_together(prompts, engine) -> None:
    config = {**job_values(engine.path, temperature=1.0, n=3), "spark": {"rows_per_chunk": 7}}
    rows = generate(prompts.coalesce(1), config, prompt="body", id="id").select("id", "sample").collect()
    assert [row.sample for row in rows] == [0, 1, 2] * NUM_ROWS
    assert all(rows[place].id == rows[place - place % 3].id for place in range(len(rows)))


def test_a_limit_stops_generation_early_and_the_engine_serves_the_next_query(prompts, engine) -> None:
    """Python hands its output to the JVM in pieces of 64 KiB, so the rows have to be wide for Spark to notice."""
    EngineFolder.make(engine.path, max_concurrency=1, step_delay_s=0.02)
    wide = prompts.selectExpr("id", "body", "repeat('x', 20000) AS padding").coalesce(1)
    assert len(generated(wide, engine).limit(1).collect()) == 1
    assert len(engine.rows()) < NUM_ROWS
    assert generated(prompts, engine).count() == NUM_ROWS


def test_a_cancelled_query_gives_up_what_has_not_begun_and_the_sidecar_serves_the_next(spark, prompts, engine) -> None:
    EngineFolder.make(engine.path, max_concurrency=1, step_delay_s=0.1)

    def cancel_after_some_rows() -> None:
        while len(engine.rows()) < 3:
            time.sleep(0.02)
        spark.sparkContext.cancelAllJobs()

    canceller = threading.Thread(target=cancel_after_some_rows)
    canceller.start()
    with pytest.raises(Exception, match=r"(?i)cancel"):
        generated(prompts, engine, engine_process="sidecar").collect()
    canceller.join()
    assert generated(prompts, engine, engine_process="sidecar").count() == NUM_ROWS
    assert len(engine.rows()) < 2 * NUM_ROWS
    assert len(engine.loads()) == 1


def test_each_python_worker_loads_one_engine_and_keeps_it_from_query_to_query(prompts, engine) -> None:
    for _ in range(3):
        assert generated(prompts.repartition(4), engine, engine_process="worker").count() == NUM_ROWS
    loads = engine.loads()
    assert len(loads) == len({load["pid"] for load in loads}) <= 2
    assert {load["threads"] for load in loads} == {1}


def test_an_executor_with_a_sidecar_loads_one_engine_for_all_its_workers(prompts, engine) -> None:
    for _ in range(2):
        assert generated(prompts.repartition(4), engine, engine_process="sidecar").count() == NUM_ROWS
    assert [load["threads"] for load in engine.loads()] == [min(2, len(os.sched_getaffinity(0)))]


def test_a_sidecar_that_is_killed_in_a_query_is_replaced_and_no_row_is_lost(prompts, engine) -> None:
    expected = texts(generated(prompts, engine))
    EngineFolder.make(engine.path, step_delay_s=0.05, max_concurrency=1)
    engine.forget()

    def kill_after_some_rows() -> None:
        while len(engine.rows()) < 10:
            time.sleep(0.02)
        os.kill(engine.loads()[0]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_after_some_rows)
    killer.start()
    assert texts(generated(prompts, engine, engine_process="sidecar")) == expected
    killer.join()
    assert len(engine.loads()) == 2


def test_a_task_that_dies_half_way_is_retried_with_the_same_output(prompts, engine) -> None:
    expected = texts(generated(prompts, engine))
    engine.forget()
    other = EngineFolder.make(engine.path.with_name("dying"), die_once_after_rows=7)
    assert texts(generated(prompts, other, engine_process="worker")) == expected
    assert (other.path / "died").exists()
    assert len(other.rows()) > NUM_ROWS


@pytest.mark.slow
def test_after_70_idle_seconds_the_sidecar_is_still_there(prompts, engine) -> None:
    """Spark ends idle Python workers after a minute."""
    assert generated(prompts, engine, engine_process="sidecar").count() == NUM_ROWS
    time.sleep(70)
    assert generated(prompts, engine, engine_process="sidecar").count() == NUM_ROWS
    assert len(engine.loads()) == 1


def texts(frame) -> dict[int, str]:
    rows = frame.select("id", "text").collect()
    assert len(rows) == NUM_ROWS
    return {row.id: row.text for row in rows}
