"""The command behind ``dspark-batch table``: a Spark table in, another out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dspark_batch.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRun:
    """The command's arguments. See ``dspark_batch.spark.run_table``."""

    config: Path
    source: str
    target: str
    staging: str
    backend: str = "ray"
    overrides: tuple[str, ...] = ()
    ray_job_address: str | None = None
    overwrite: bool = False


def run_spark_table(run: TableRun) -> str:
    """Run it in the session of this process (``spark-submit``), or one that it makes; a text about the result.

    Raises what ``run_table`` raises, and ConfigError for a backend that is not known.
    """
    if run.backend not in ("ray", "spark"):
        message = f"must be ray or spark, got {run.backend!r}"
        raise ConfigError([Problem("--backend", message, "command line")])
    from pyspark.sql import SparkSession

    from dspark_batch.spark.table import run_table

    spark = SparkSession.builder.getOrCreate()
    result = run_table(
        spark,
        run.source,
        run.target,
        run.config,
        staging=run.staging,
        backend="ray" if run.backend == "ray" else "spark",
        overrides=run.overrides,
        if_exists="overwrite" if run.overwrite else "error",
        ray_job_address=run.ray_job_address,
    )
    return f"{run.target}: {result.count()} rows"
