"""Generation as a SQL table function: ``SELECT * FROM dspark_generate_table(TABLE(t), prompt => 'body')``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.sql.conversion import LocalDataToArrowConversion
from pyspark.sql.functions import udtf
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StringType, StructField, StructType
from pyspark.sql.udtf import AnalyzeArgument, AnalyzeResult

from dspark_batch.batch.prompts import prompt_columns
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.spark.calls import SAMPLING_ARGUMENTS
from dspark_batch.spark.client import ROW_ID_COLUMN, Chunk, EngineClient, EngineSpec
from dspark_batch.spark.executor import process_engines
from dspark_batch.spark.functions import check_function_name
from dspark_batch.spark.identity import RowIdentity
from dspark_batch.spark.jobs import engine_job, resolve_config
from dspark_batch.spark.session import check_session, engine_spec
from dspark_batch.spark.stream import OPEN_FACTOR
from dspark_batch.spark.transform import output_schema

if TYPE_CHECKING:
    from pyspark.sql import Row, SparkSession

TABLE_ARGUMENTS = ("prompt", "id", "column_name", *SAMPLING_ARGUMENTS)


def register_table_function(spark: SparkSession, name: str, config: ConfigLike) -> None:
    """Make ``name`` a table function: the rows of a table with generated columns, as ``generate`` gives them.

    Arguments, all by name and constant: prompt (a template, or a column's name), id (a column's name), column_name
    (of the generated column), max_tokens, temperature, top_p, seed; each replaces what the config says. Rows travel
    one by one between the JVM and Python here; for large tables ``generate`` is faster.

    Raises:
        ConfigError: ``name`` is no identifier, or the session is refused (``spark.on_speculation``). What is wrong
            with a call, its query says.
    """
    check_function_name(name)
    base = resolve_config(config, prompt=None if _has_prompt(config) else "{{ prompt }}")
    check_session(spark, base)
    function = TableFunction(base, has_prompt=_has_prompt(config), engine=engine_spec(spark, base))

    class Generate:
        def __init__(self, analyzed: TableAnalysis) -> None:
            self._rows = function.open(analyzed)

        @staticmethod
        def analyze(table: AnalyzeArgument, **arguments: AnalyzeArgument) -> AnalyzeResult:
            return function.analyze(table, arguments)

        def eval(self, table: Row, **_: object) -> Iterator[tuple[object, ...]]:
            return self._rows.put(table)

        def terminate(self) -> Iterator[tuple[object, ...]]:
            return self._rows.finish()

        def cleanup(self) -> None:
            self._rows.close()

    spark.udtf.register(name, udtf(Generate))


@dataclass
class TableAnalysis(AnalyzeResult):  # type: ignore[misc]
    """A call's result columns, and what its partitions need to produce them."""

    job: JobConfig | None = None
    input_schema: StructType | None = None


@dataclass(frozen=True, slots=True)
class TableFunction:
    """The importable part of a registered table function; plain values."""

    base: JobConfig
    has_prompt: bool
    engine: EngineSpec

    def analyze(self, table: AnalyzeArgument, arguments: Mapping[str, AnalyzeArgument]) -> TableAnalysis:
        """The columns of a call. Raises ConfigError for arguments that are unknown, not constant or do not fit."""
        if not table.isTable or not isinstance(table.dataType, StructType):
            raise ConfigError([Problem("table", "the first argument must be TABLE(...)", "argument")])
        values = _constants(arguments)
        if values.get("prompt") is None and not self.has_prompt:
            raise ConfigError([Problem("prompt", "is required: the config has no prompt section", "argument")])
        overrides = [
            f"sampling.{target}={values[name]}"
            for name, target in SAMPLING_ARGUMENTS.items()
            if values.get(name) is not None
        ]
        job = resolve_config(
            self.base,
            prompt=values.get("prompt"),
            id=values.get("id"),
            column=values.get("column_name"),
            overrides=overrides,
            columns_at_hand=table.dataType.names,
        )
        return TableAnalysis(schema=output_schema(table.dataType, job), job=job, input_schema=table.dataType)

    def open(self, analyzed: TableAnalysis) -> PartitionRows:
        """The rows of one partition; the engine is looked for when the first row comes."""
        assert analyzed.job is not None
        assert analyzed.input_schema is not None
        return PartitionRows(analyzed.job, schema=analyzed.input_schema, engine=self.engine)


class PartitionRows:
    """Collects rows to chunks, and gives them back in order as they finish."""

    def __init__(self, job: JobConfig, *, schema: StructType, engine: EngineSpec) -> None:
        self._job = job
        self._engine = engine
        self._client: EngineClient | None = None
        self._kept = job.input.columns if job.input.columns is not None else list(schema.names)
        self._needed = prompt_columns(job.prompt)
        self._read = list(dict.fromkeys([*self._needed, *([job.input.id] if job.input.id else [])]))
        self._schema = StructType([*(schema[name] for name in self._read), StructField(ROW_ID_COLUMN, StringType())])
        arrow = to_arrow_schema(self._schema, timezone="UTC")
        self._identity = RowIdentity(job.prompt, id_column=job.input.id, input_schema=arrow)
        self._buffer: list[Row] = []
        self._pending: deque[tuple[list[Row], Future[pa.Table]]] = deque()

    def put(self, row: Row) -> Iterator[tuple[object, ...]]:
        """Take a row; gives whatever finished meanwhile, and waits only where enough is in flight."""
        self._buffer.append(row)
        if len(self._buffer) >= self._job.spark.rows_per_chunk:
            self._submit()
        while self._pending and (self._pending[0][1].done() or self._is_full):
            yield from self._pop()

    def finish(self) -> Iterator[tuple[object, ...]]:
        """The rest of the rows."""
        if self._buffer:
            self._submit()
        while self._pending:
            yield from self._pop()

    def close(self) -> None:
        if self._client is not None:
            self._client.release([future for _, future in self._pending])
            self._client.close()

    @property
    def _is_full(self) -> bool:
        assert self._client is not None
        return sum(len(rows) for rows, _ in self._pending) > 2 * OPEN_FACTOR * self._client.max_concurrency

    def _submit(self) -> None:
        if self._client is None:
            self._client = process_engines.client(self._engine)
        table = _arrow_table([(*(row[name] for name in self._read), "") for row in self._buffer], self._schema)
        ids = pa.array(self._identity.of(table), type=pa.string())
        shipped = table.select(list(self._needed)).append_column(ROW_ID_COLUMN, ids)
        chunk = Chunk(job=engine_job(self._job), table=shipped)
        self._pending.append((self._buffer, self._client.submit(chunk)))
        self._buffer = []

    def _pop(self) -> Iterator[tuple[object, ...]]:
        rows, future = self._pending.popleft()
        added = future.result().to_pylist()
        num_samples = self._job.sampling.n
        for place, generated in enumerate(added):
            row = rows[place // num_samples]
            yield (*(row[name] for name in self._kept), *generated.values())


def _arrow_table(rows: list[tuple[object, ...]], schema: StructType) -> pa.Table:
    """The rows with every time in UTC: PySpark gives times without a zone, as the clock of the worker shows them."""
    table: pa.Table = LocalDataToArrowConversion.convert(rows, schema, use_large_var_types=False)
    return table


def _constants(arguments: Mapping[str, AnalyzeArgument]) -> dict[str, Any]:
    problems = [
        Problem(name, f"is not an argument; the arguments are: {', '.join(TABLE_ARGUMENTS)}", "argument")
        for name in arguments
        if name not in TABLE_ARGUMENTS
    ]
    problems += [
        Problem(name, "must be a constant", "argument")
        for name, value in arguments.items()
        if name in TABLE_ARGUMENTS and not value.isConstantExpression
    ]
    if problems:
        raise ConfigError(problems)
    return {name: value.value for name, value in arguments.items()}


def _has_prompt(config: ConfigLike) -> bool:
    from dspark_batch.job.loader import read_values

    section = read_values(config).get("prompt") or {}
    return isinstance(section, Mapping) and any(section.get(name) for name in ("template", "messages", "token_ids"))
