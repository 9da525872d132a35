"""Calls of a column function: arrays of prompts and arguments in, one array of result structs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
from pydantic import ValidationError

from dspark_batch.batch.schema import result_columns, row_schema
from dspark_batch.core import ErrorCode, Request, Result, RowError
from dspark_batch.job.config import JobConfig
from dspark_batch.sampling.config import SamplingSection
from dspark_batch.spark.client import ROW_ID_COLUMN, Chunk, EngineClient
from dspark_batch.spark.identity import RowIdentity
from dspark_batch.spark.jobs import PROMPT_ARGUMENT, engine_job
from dspark_batch.spark.stream import Work, stream

ID_ARGUMENT = "id"
SAMPLING_ARGUMENTS = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
}
"""Arguments of a call, and the sampling fields that they replace where they are not NULL."""

ARGUMENTS = (PROMPT_ARGUMENT, ID_ARGUMENT, *SAMPLING_ARGUMENTS)

Array: TypeAlias = "pa.Array[Any]"
_Values = tuple[object, ...]


@dataclass(slots=True)
class _Slice:
    """Rows that come out together. ``sources[i]`` is row i's place among all parts' rows; None for a NULL prompt."""

    num_parts: int
    sources: list[int | None]
    failed: list[Result]
    parts: list[pa.Table] = field(default_factory=list)


def generate_calls(batches: Iterable[tuple[Array, ...]], *, job: JobConfig, client: EngineClient) -> Iterator[Array]:
    """One struct per call, in order: the added columns of the job's rows; NULL for a NULL prompt, without generation.

    A batch holds the arrays of ``ARGUMENTS``; one of length 1 stands for every row. Rows with other sampling arguments
    than the job's decode in the same continuous batch. Arguments out of range give an error struct.
    """
    for piece, added in stream(_works(batches, job=job), client):
        piece.parts.append(added)
        if len(piece.parts) == piece.num_parts:
            yield _assembled(piece, job=job)


def _works(batches: Iterable[tuple[Array, ...]], *, job: JobConfig) -> Iterator[Work[_Slice]]:
    caller = _Caller(job)
    for arrays in batches:
        columns = _of_equal_length(arrays)
        for start in range(0, len(columns[0]), job.spark.rows_per_chunk):
            yield from caller.works([column.slice(start, job.spark.rows_per_chunk) for column in columns])


class _Caller:
    def __init__(self, job: JobConfig) -> None:
        self._job = job
        self._jobs: dict[_Values, JobConfig | RowError] = {}

    def works(self, columns: list[Array]) -> list[Work[_Slice]]:
        table = pa.table(columns[:2], names=[PROMPT_ARGUMENT, ID_ARGUMENT])
        sampling = list(zip(*(column.to_pylist() for column in columns[2:]), strict=True))
        groups: dict[_Values, list[int]] = {}
        failed: list[tuple[int, RowError]] = []
        for row, is_null in enumerate(columns[0].is_null().to_pylist()):
            if is_null:
                continue
            variant = self._variant(sampling[row])
            if isinstance(variant, RowError):
                failed.append((row, variant))
            else:
                groups.setdefault(sampling[row], []).append(row)
        sources: list[int | None] = [None] * table.num_rows
        order = [row for rows in groups.values() for row in rows] + [row for row, _ in failed]
        for place, row in enumerate(order):
            sources[row] = place
        results = [Result.failed(Request(id="", prompt=""), error) for _, error in failed]
        parts = list(groups.items()) or [((None,) * len(SAMPLING_ARGUMENTS), [])]
        piece = _Slice(num_parts=len(parts), sources=sources, failed=results)
        return [Work(self._chunk(table, key, rows), piece) for key, rows in parts]

    def _chunk(self, table: pa.Table, key: _Values, rows: list[int]) -> Chunk:
        variant = self._variant(key)
        assert isinstance(variant, JobConfig)
        part = table.take(pa.array(rows, type=pa.int64()))
        has_ids = not pa.types.is_null(part.schema.field(ID_ARGUMENT).type)
        identity = RowIdentity(variant.prompt, id_column=ID_ARGUMENT if has_ids else None, input_schema=part.schema)
        shipped = part.select([PROMPT_ARGUMENT]).append_column(ROW_ID_COLUMN, pa.array(identity.of(part), pa.string()))
        return Chunk(job=variant, table=shipped)

    def _variant(self, arguments: _Values) -> JobConfig | RowError:
        known = self._jobs.get(arguments)
        if known is None:
            known = self._jobs[arguments] = with_arguments(engine_job(self._job), arguments)
        return known


def with_arguments(job: JobConfig, arguments: _Values) -> JobConfig | RowError:
    """The job with the values of ``SAMPLING_ARGUMENTS`` that are not None; an error where one is out of range."""
    given = {
        name: value for name, value in zip(SAMPLING_ARGUMENTS.values(), arguments, strict=True) if value is not None
    }
    if not given:
        return job
    try:
        changed = job.model_copy(update={"sampling": SamplingSection(**{**job.sampling.model_dump(), **given})})
        changed.sampling_params()
    except ValidationError as error:
        message = "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
        return RowError(code=ErrorCode.INVALID_SAMPLING, message=message)
    except ValueError as error:
        return RowError(code=ErrorCode.INVALID_SAMPLING, message=str(error))
    return changed


def _of_equal_length(arrays: tuple[Array, ...]) -> list[Array]:
    assert len(arrays) == len(ARGUMENTS), len(arrays)
    num_rows = max(len(array) for array in arrays)
    return [
        array if len(array) == num_rows else array.take(pa.array([0] * num_rows, type=pa.int64())) for array in arrays
    ]


def _assembled(piece: _Slice, *, job: JobConfig) -> Array:
    schema = row_schema(engine_job(job), input_schema=pa.schema([]))
    failed = pa.Table.from_arrays(result_columns(piece.failed, schema=schema), schema=schema.added)
    rows = pa.concat_tables([*piece.parts, failed]).to_struct_array()
    structs = rows.combine_chunks() if isinstance(rows, pa.ChunkedArray) else rows
    return structs.take(pa.array(piece.sources, type=pa.int64()))
