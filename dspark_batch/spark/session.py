"""What the driver asks of a session before it plans generation. Works on classic sessions and on Connect."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from dspark_batch.batch.engines import configured_factory
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import JobConfig
from dspark_batch.spark.client import EngineSpec

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_LOCAL_MASTER = re.compile(r"local\[(\d+|\*)(?:,\s*\d+)?\]")
_LOCAL_CLUSTER = re.compile(r"local-cluster\[\s*\d+\s*,\s*(\d+)\s*,\s*\d+\s*\]")


class SpeculationWarning(UserWarning):
    """Spark may run slow tasks twice, and generation is slow."""


def engine_spec(spark: SparkSession, job: JobConfig) -> EngineSpec:
    """The engine that executors of this session need for a job."""
    return EngineSpec(
        config=job.engine_config(),
        settings=job.spark,
        factory=configured_factory(),
        executor_cores=executor_cores(
            master=setting(spark, "spark.master"), configured=setting(spark, "spark.executor.cores")
        ),
    )


def check_session(spark: SparkSession, job: JobConfig) -> None:
    """Warn or refuse under speculative execution, as ``spark.on_speculation`` says. Raises ConfigError to refuse."""
    if job.spark.on_speculation == "ignore" or (setting(spark, "spark.speculation") or "").lower() != "true":
        return
    message = (
        "spark.speculation is true: Spark runs slow tasks twice, which generates their rows twice (the texts are "
        "equal, the time is lost). Set spark.speculation=false for this application"
    )
    if job.spark.on_speculation == "refuse":
        raise ConfigError([Problem("spark.on_speculation", f"{message}, or spark.on_speculation=warn", "session")])
    warnings.warn(message, SpeculationWarning, stacklevel=4)


def setting(spark: SparkSession, name: str) -> str | None:
    """A setting of the session, or None where it is not set."""
    value = spark.conf.get(name, None)
    return None if value is None else str(value)


def executor_cores(*, master: str | None, configured: str | None) -> int | None:
    """Cores of one executor, as far as the settings tell."""
    if configured is not None and configured.isdecimal():
        return int(configured)
    for pattern in (_LOCAL_MASTER, _LOCAL_CLUSTER):
        found = pattern.fullmatch(master or "")
        if found is not None and found.group(1) != "*":
            return int(found.group(1))
    return 1 if master == "local" else None
