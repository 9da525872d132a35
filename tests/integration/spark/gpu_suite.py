"""Runs in a pytest process of its own: two executors of one worker, each with a GPU that a script makes up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dspark_batch.spark import generate
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.processes import is_running, wait_until_gone
from dspark_batch.testing.spark_rows import job_values

FOLDER = Path(os.environ["DSPARK_BATCH_TEST_FOLDER"])
NUM_ROWS = 20


@pytest.fixture(scope="module")
def spark():
    from pyspark.sql import SparkSession

    script = FOLDER / "gpus.sh"
    script.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0", "1"]}'\n""")
    script.chmod(0o755)
    settings = {
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.warehouse.dir": str(FOLDER / "warehouse"),
        "spark.executor.cores": "1",
        "spark.executor.memory": "512m",
        "spark.worker.resource.gpu.amount": "2",
        "spark.worker.resource.gpu.discoveryScript": str(script),
        "spark.executor.resource.gpu.amount": "1",
        "spark.executor.resource.gpu.discoveryScript": str(script),
        "spark.task.resource.gpu.amount": "1",
        "spark.scheduler.minRegisteredResourcesRatio": "1.0",
        "spark.cores.max": "2",
        "spark.locality.wait": "0",
    }
    if "PYTHONPATH" in os.environ:
        settings["spark.executorEnv.PYTHONPATH"] = os.environ["PYTHONPATH"]
    builder = SparkSession.builder.master("local-cluster[1,2,1100]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


def generated(spark, engine: EngineFolder, **settings):
    frame = spark.range(NUM_ROWS).selectExpr("id", "concat('row ', id) AS body")
    config = {**job_values(engine.path), "spark": settings}
    return generate(frame, config, prompt="body", id="id", num_partitions=2)


@pytest.mark.parametrize("process", ["worker", "auto"])
def test_the_engine_of_each_executor_sees_its_own_device(spark, process) -> None:
    engine = EngineFolder.make(FOLDER / process, step_delay_s=0.05)
    assert generated(spark, engine, engine_process=process).count() == NUM_ROWS
    assert sorted(load["CUDA_VISIBLE_DEVICES"] for load in engine.loads()) == ["0", "1"]
    assert len(engine.rows()) == NUM_ROWS


def test_the_sidecars_end_with_their_executors(spark) -> None:
    pids = [load["pid"] for load in EngineFolder(FOLDER / "auto").loads()]
    assert len(pids) == 2
    assert all(is_running(pid) for pid in pids)
    spark.stop()
    wait_until_gone(pids)
