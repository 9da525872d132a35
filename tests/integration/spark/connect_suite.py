"""Runs in a pytest process of its own (see ``test_spark_other_sessions``): classic and Connect sessions exclude each
other. The environment names a folder in which the counting engine notes its loads."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest

from dspark_batch.spark import generate, generate_udf, register, register_table_function, run_table
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.spark_rows import SCHEMA, TEMPLATE, job_values, local_texts, review_rows

SAMPLING = {"greedy": {"temperature": 0.0}, "hot": {"temperature": 0.8, "seed": 11}}
FOLDER = Path(os.environ["DSPARK_BATCH_TEST_FOLDER"])


@pytest.fixture(scope="module")
def spark():
    from pyspark.sql import SparkSession

    settings = {
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.warehouse.dir": str(FOLDER / "warehouse"),
    }
    builder = SparkSession.builder.remote("local[2]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to set spark", UserWarning)  # set again on a server that has them
        session = builder.getOrCreate()
    yield session
    session.stop()


@pytest.fixture(scope="module")
def reviews(spark):
    frame = spark.createDataFrame(review_rows(), SCHEMA)
    frame.createOrReplaceTempView("reviews")
    return frame


@pytest.fixture(scope="module")
def cases():
    engine = EngineFolder.make(FOLDER / "engine")
    return {
        name: (engine, sampling, local_texts(FOLDER / name, target=engine.path, **sampling))
        for name, sampling in SAMPLING.items()
    }


def texts(frame) -> dict[int, str | None]:
    rows = frame.select("review_id", "text").collect()
    found = {row.review_id: row.text for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(("process", "temperature"), [("worker", "greedy"), ("sidecar", "hot")])
def test_generate(reviews, cases, process, temperature) -> None:
    engine, sampling, expected = cases[temperature]
    config = {**job_values(engine.path, **sampling), "spark": {"engine_process": process, "rows_per_chunk": 9}}
    assert texts(generate(reviews, config, prompt=TEMPLATE, id="review_id", num_partitions=3)) == expected


def test_column_function(reviews, cases) -> None:
    from pyspark.sql.functions import concat, lit

    engine, sampling, expected = cases["hot"]
    udf = generate_udf(job_values(engine.path, **sampling))
    frame = reviews.withColumn("r", udf(concat(lit("Summarise: "), "body"), "review_id"))
    assert texts(frame.filter("true").select("review_id", "r.text")) == expected


def test_sql_function(spark, reviews, cases) -> None:
    engine, sampling, expected = cases["hot"]
    register(spark, "dspark_generate", job_values(engine.path, **sampling))
    frame = spark.sql(
        "SELECT review_id, dspark_generate('Summarise: ' || body, id => CAST(review_id AS STRING), max_tokens => 7)"
        ".text AS text FROM reviews"
    )
    assert texts(frame) == expected


def test_table_function(spark, reviews, cases) -> None:
    engine, sampling, expected = cases["hot"]
    register_table_function(spark, "dspark_generate_table", job_values(engine.path, **sampling))
    frame = spark.sql(f"SELECT * FROM dspark_generate_table(TABLE(reviews), prompt => '{TEMPLATE}', id => 'review_id')")
    assert texts(frame) == expected


def test_run_table(spark, reviews, cases) -> None:
    engine, sampling, expected = cases["hot"]
    staging = FOLDER / "staging"
    config = {**job_values(engine.path, **sampling), "limits": {"max_failed_fraction": 1.0}}
    try:
        frame = run_table(
            spark, reviews, "landed", config, staging=str(staging), backend="spark", prompt=TEMPLATE, id="review_id"
        )
        assert texts(frame) == expected
    finally:
        spark.sql("DROP TABLE IF EXISTS landed")
        shutil.rmtree(staging, ignore_errors=True)
