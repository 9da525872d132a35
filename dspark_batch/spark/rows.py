"""Batches of a partition to chunks for the engine, and the finished chunks back to batches for Spark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from dspark_batch.batch.prompts import prompt_columns
from dspark_batch.batch.schema import row_schema
from dspark_batch.job.config import JobConfig
from dspark_batch.spark.client import ROW_ID_COLUMN, Chunk, EngineClient
from dspark_batch.spark.identity import RowIdentity
from dspark_batch.spark.jobs import engine_job
from dspark_batch.spark.stream import Work, stream


def added_schema(job: JobConfig) -> pa.Schema:
    """The columns that a job adds to its rows."""
    return row_schema(engine_job(job), input_schema=pa.schema([])).added


def generate_batches(
    batches: Iterable[pa.RecordBatch], *, job: JobConfig, client: EngineClient
) -> Iterator[pa.RecordBatch]:
    """The rows of all batches, in order, with the generated columns behind those that are carried over.

    Columns come out in the declared order and types, as Spark matches them by place and does not cast.
    """
    for carried, added in stream(_works(batches, job=job), client):
        yield _joined(carried, added, num_samples=job.sampling.n)


def _works(batches: Iterable[pa.RecordBatch], *, job: JobConfig) -> Iterator[Work[pa.RecordBatch]]:
    for_engine = engine_job(job)
    needed = prompt_columns(job.prompt)
    identity: RowIdentity | None = None
    for batch in batches:
        if identity is None:
            identity = RowIdentity(job.prompt, id_column=job.input.id, input_schema=batch.schema)
        kept_names = job.input.columns if job.input.columns is not None else batch.schema.names
        for start in range(0, batch.num_rows, job.spark.rows_per_chunk):
            part = batch.slice(start, job.spark.rows_per_chunk)
            table = pa.Table.from_batches([part])
            shipped = table.select(list(needed)).append_column(
                pa.field(ROW_ID_COLUMN, pa.string()), pa.array(identity.of(table), type=pa.string())
            )
            yield Work(Chunk(job=for_engine, table=shipped), part.select(kept_names))


def _joined(carried: pa.RecordBatch, added: pa.Table, *, num_samples: int) -> pa.RecordBatch:
    assert added.num_rows == carried.num_rows * num_samples, (added.num_rows, carried.num_rows, num_samples)
    if num_samples > 1:
        carried = carried.take(pa.array([row for row in range(carried.num_rows) for _ in range(num_samples)]))
    generated: list[Any] = [column.combine_chunks() for column in added.columns]
    schema = pa.schema([*carried.schema, *added.schema])
    return pa.RecordBatch.from_arrays([*carried.columns, *generated], schema=schema)
