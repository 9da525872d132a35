"""A Spark table with every type of column that comes back from a job, and a driver process to be killed at work on it.

``python -m dspark_batch.testing.wide_table SETTINGS`` is that process; settings are a ``TableDriver`` as JSON.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, Row, SparkSession

    from dspark_batch.spark.staging import Stages

WIDE_SCHEMA = """
  id long, body string, small int, amount decimal(12,3), day date, at timestamp, at_wall timestamp_ntz,
  tags array<string>, place struct<city: string, geo: struct<lat: double, long: double>>,
  counts map<string, int>, raw binary, ok boolean, ratio float, times array<timestamp>
"""
NULL_ID = 9999
PROMPT = "Say {{ body }}"
TARGET = "landed"
SLOW_PART_S = 1.0
NUM_SLOW_PARTS = 6
"""Parts of a slow staging, two at a time."""

Stage = Literal["staging", "generation", "landing"]


def wide_rows(num_rows: int) -> list[Row]:
    """``num_rows`` full rows, one with an id and a body only, and one with the id ``NULL_ID`` and nothing else."""
    from pyspark.sql import Row

    bare = Row(num_rows, "only the text", *([None] * 12))
    return [*map(_full_row, range(num_rows)), bare, Row(NULL_ID, *([None] * 13))]


def canonical(frame: DataFrame) -> list[str]:
    """The rows as text, whatever their order."""
    return sorted(str(row.asDict(recursive=True)) for row in frame.collect())


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDriver:
    """One call of ``run_table`` over ``num_rows`` rows, with everything that it writes in ``folder``.

    slow: the stage that takes some seconds, so that it can be killed in its middle. keeps_tables: in a catalog on disk
    (Hive's, on Derby), which the next process finds; it takes some seconds more to start.
    """

    folder: str
    config: dict[str, Any]
    num_rows: int
    backend: Literal["ray", "spark"]
    slow: Stage | None = None
    keeps_tables: bool = False

    @property
    def staging(self) -> Path:
        return Path(self.folder) / "staging"

    @property
    def result(self) -> Path:
        """Written at the end: the canonical rows of the target, as JSON."""
        return Path(self.folder) / "result.json"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _full_row(number: int) -> Row:
    from pyspark.sql import Row

    at = dt.datetime(2026, 3, 29, 0, 30, 0, 123456) + dt.timedelta(hours=number)
    return Row(
        number,
        f"text {number} ünï",
        number - 5,
        Decimal(number) * Decimal("1234.567"),
        dt.date(1969, 12, 25) + dt.timedelta(days=number),
        at.replace(tzinfo=dt.UTC),
        at,
        [f"t{n}" for n in range(number % 3)] + [None],
        Row("Köln", Row(50.9, None)),
        {"a": number, "b": None},
        bytes([number % 256, 0, 255]),
        number % 2 == 0,
        number / 7,
        [at.replace(tzinfo=dt.UTC), None],
    )


def _session(folder: str, *, keeps_tables: bool) -> SparkSession:
    from pyspark.sql import SparkSession

    settings = {
        "spark.driver.extraJavaOptions": f"-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Dderby.system.home={folder}",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": f"{folder}/local",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.session.timeZone": "Europe/Berlin",
        "spark.sql.warehouse.dir": f"{folder}/warehouse",
        "spark.hadoop.javax.jdo.option.ConnectionURL": f"jdbc:derby:;databaseName={folder}/catalog;create=true",
    }
    builder = SparkSession.builder.master("local[2]")
    if keeps_tables:
        builder = builder.enableHiveSupport()
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _slowly(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        time.sleep(SLOW_PART_S)
        yield batch


def _delay_the_last_record() -> None:
    """Landed rows are recorded some seconds late."""
    from dspark_batch.spark import staging

    save = staging.StagingFolder.save

    def late(folder: staging.StagingFolder, stages: Stages) -> None:
        if stages.is_landed:
            time.sleep(5 * SLOW_PART_S)
        save(folder, stages)

    staging.StagingFolder.save = late  # type: ignore[method-assign, assignment]


def main(driver: TableDriver) -> None:
    from dspark_batch.spark import run_table

    spark = _session(driver.folder, keeps_tables=driver.keeps_tables)
    frame = spark.createDataFrame(wide_rows(driver.num_rows), WIDE_SCHEMA)
    if driver.slow == "staging":
        frame = frame.repartition(NUM_SLOW_PARTS).mapInArrow(_slowly, frame.schema)
    if driver.slow == "landing":
        _delay_the_last_record()
    found = run_table(
        spark,
        frame,
        TARGET,
        driver.config,
        staging=str(driver.staging),
        backend=driver.backend,
        prompt=PROMPT,
        id="id",
    )
    driver.result.write_text(json.dumps(canonical(found)))
    spark.stop()


if __name__ == "__main__":
    main(TableDriver(**json.loads(sys.argv[1])))
