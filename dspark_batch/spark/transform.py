"""``generate``: a DataFrame in, the same rows out with generated columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType

from dspark_batch.batch.worker import check_schema
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.spark.client import EngineSpec
from dspark_batch.spark.executor import process_engines
from dspark_batch.spark.jobs import resolve_config
from dspark_batch.spark.rows import added_schema, generate_batches
from dspark_batch.spark.session import check_session, engine_spec

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import DataFrame


def generate(
    df: DataFrame,
    config: ConfigLike,
    *,
    prompt: str | None = None,
    id: str | None = None,
    column: str | None = None,
    overrides: Sequence[str] = (),
    num_partitions: int | None = None,
    profile: ResourceProfile | None = None,
) -> DataFrame:
    """The rows of ``df`` with generated columns: the text, why it ended, token counts, and an error where it failed.

    Lazy, as every DataFrame; rows never raise. Each action on the result generates again: write or persist it first.

    Args:
        config: a YAML file, the same sections as a mapping, or a ``JobConfig``; ``input`` and ``output`` may lack.
        prompt: a Jinja2 template over the columns, or the name of a column; instead of the config's prompt.
        id: the column that identifies a row. It keys the row's random draws; without it the rendered prompt does, so
            rows with equal prompts get equal texts.
        column: name of the generated column.
        overrides: as on the command line, such as ``"sampling.seed=1"``.
        num_partitions: spread the rows over so many tasks first. Spark tends to leave a small table in one partition.
        profile: resources of the tasks (stage-level scheduling).

    Raises:
        ConfigError: the config, or a column or template in it, is wrong; every problem is listed. Or
            ``spark.on_speculation`` refuses the session.
    """
    spark = df.sparkSession
    job = resolve_config(config, prompt=prompt, id=id, column=column, overrides=overrides, columns_at_hand=df.columns)
    check_session(spark, job)
    declared = output_schema(df.schema, job)
    rows = df if num_partitions is None else df.repartition(num_partitions)
    task = GenerateTask(job, engine_spec(spark, job))
    return rows.mapInArrow(task, declared, profile=profile)


def output_schema(schema: StructType, job: JobConfig) -> StructType:
    """The columns of the result. Raises ConfigError for everything in the job that does not fit the DataFrame."""
    arrow = to_arrow_schema(schema, timezone="UTC")
    check_schema(job, input_schema=arrow)
    carried = job.input.columns if job.input.columns is not None else list(schema.names)
    added = added_schema(job)
    _refuse_equal_names(carried, added.names)
    kept = [schema[name] for name in carried]
    return StructType([*kept, *from_arrow_schema(added).fields])


def _refuse_equal_names(carried: Sequence[str], added: Sequence[str]) -> None:
    """Spark tells columns apart without regard to case."""
    known = {name.lower(): name for name in carried}
    problems = [
        Problem("output.column", f"the DataFrame's column {known[name.lower()]!r} differs from {name!r} in case only")
        for name in added
        if name.lower() in known
    ]
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class GenerateTask:
    """What runs on a partition; plain values, importable by executors."""

    job: JobConfig
    engine: EngineSpec

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Generates for all batches of the partition. The engine is looked for when the first row comes."""
        first = next(batches, None)
        while first is not None and first.num_rows == 0:
            first = next(batches, None)
        if first is None:
            return
        client = process_engines.client(self.engine)
        try:
            yield from generate_batches(_chained(first, batches), job=self.job, client=client)
        finally:
            client.close()


def _chained(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest
