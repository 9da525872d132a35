"""One classic Spark session for all tests of this folder; everything on the loopback address."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_batch.testing.counting_engine import FACTORY, EngineFolder

HAS_JAVA = shutil.which("java") is not None or bool(os.environ.get("JAVA_HOME"))
LOOPBACK = {
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",  # short-lived: starts in half the time
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.session.timeZone": "Europe/Berlin",
}


@pytest.fixture(scope="package", autouse=True)
def executor_environment() -> Iterator[None]:
    """Python and engine of the executors; the factory is looked up on the driver."""
    if not HAS_JAVA:
        pytest.skip("Spark needs Java 17: no java on the PATH and no JAVA_HOME")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYSPARK_PYTHON", sys.executable)
    patch.setenv("PYSPARK_DRIVER_PYTHON", sys.executable)
    patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    patch.setenv("DSPARK_BATCH_ENGINE_FACTORY", FACTORY)
    yield
    patch.undo()


@pytest.fixture(scope="package")
def spark(executor_environment: None, tmp_path_factory: pytest.TempPathFactory):
    """``local[2,3]``: two slots, and a task may fail twice."""
    from pyspark.sql import SparkSession

    warehouse = tmp_path_factory.mktemp("warehouse")
    builder = SparkSession.builder.master("local[2,3]").config("spark.sql.warehouse.dir", str(warehouse))
    for name, value in LOOPBACK.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture
def engine(tmp_path: Path) -> EngineFolder:
    return EngineFolder.make(tmp_path / "engine")
