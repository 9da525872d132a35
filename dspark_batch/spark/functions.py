"""Generation as a column function, in Python and in SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import ArrayType, DataType, StructType

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.spark.calls import ARGUMENTS, generate_calls
from dspark_batch.spark.client import EngineSpec
from dspark_batch.spark.executor import process_engines
from dspark_batch.spark.jobs import resolve_column_config
from dspark_batch.spark.rows import added_schema
from dspark_batch.spark.session import check_session, engine_spec

if TYPE_CHECKING:
    from pyspark.sql import Column

ColumnLike: TypeAlias = "Column | str"

SQL_TYPES = {
    "prompt": "STRING",
    "id": "STRING",
    "max_tokens": "INT",
    "temperature": "DOUBLE",
    "top_p": "DOUBLE",
    "seed": "BIGINT",
}


class GenerateFunction(Protocol):
    """What ``generate_udf`` gives: columns (or their names) in, a struct column out.

    ``id`` keys a row's random draws; without it the rendered prompt does. The others replace the config's sampling
    where they are not NULL.
    """

    def __call__(
        self,
        prompt: ColumnLike,
        id: ColumnLike | None = None,
        *,
        max_tokens: ColumnLike | None = None,
        temperature: ColumnLike | None = None,
        top_p: ColumnLike | None = None,
        seed: ColumnLike | None = None,
    ) -> Column: ...


def generate_udf(
    config: ConfigLike, *, overrides: Sequence[str] = (), spark: SparkSession | None = None
) -> GenerateFunction:
    """A function from a prompt column to a struct {text, finish_reason, token counts, error}.

    A NULL prompt gives a NULL struct and costs nothing; a row that fails gives a struct with its ``error``. Spark does
    not evaluate the function twice for filters on its result, nor does it move filters below it: filter first.

    Raises:
        ConfigError: the config is wrong, its template reads other columns than ``prompt``, or ``sampling.n`` is not 1.
    """
    job = resolve_column_config(config, overrides=overrides)
    udf = _arrow_function(job, session=spark or SparkSession.active())

    def call(
        prompt: ColumnLike,
        id: ColumnLike | None = None,
        *,
        max_tokens: ColumnLike | None = None,
        temperature: ColumnLike | None = None,
        top_p: ColumnLike | None = None,
        seed: ColumnLike | None = None,
    ) -> Column:
        given = (prompt, id, max_tokens, temperature, top_p, seed)
        typed = zip(given, SQL_TYPES.values(), strict=True)
        return udf(*(F.lit(None).cast(kind) if value is None else value for value, kind in typed))

    return call


def register(spark: SparkSession, name: str, config: ConfigLike, *, overrides: Sequence[str] = ()) -> None:
    """Make ``name`` a temporary SQL function with named, optional arguments.

    ``SELECT dspark_generate(prompt, id => review_id, max_tokens => 64, temperature => 0.7D).text FROM t``. Arguments:
    prompt, id (text), max_tokens, temperature, top_p, seed. It gives the struct of ``generate_udf``.

    Raises:
        ConfigError: as ``generate_udf``, or ``name`` is no identifier.
    """
    check_function_name(name)
    job = resolve_column_config(config, overrides=overrides)
    inner = f"{name}__calls"
    spark.udf.register(inner, _arrow_function(job, session=spark))
    parameters = ", ".join(f"{key} {kind}" + _default(key) for key, kind in SQL_TYPES.items())
    spark.sql(
        f"CREATE OR REPLACE TEMPORARY FUNCTION {name}({parameters}) "
        f"RETURNS {_sql_type(struct_type(job))} RETURN {inner}({', '.join(ARGUMENTS)})"
    )


def struct_type(job: JobConfig) -> StructType:
    """The struct that a column function of the job gives."""
    return from_arrow_schema(added_schema(job))


def check_function_name(name: str) -> None:
    """Raises ConfigError where Spark could not parse the name."""
    if not (name.isidentifier() and name.isascii()):
        message = f"{name!r} is not a name for a SQL function; use letters, digits and underscores"
        raise ConfigError([Problem("name", message, "argument")])


@dataclass(frozen=True, slots=True)
class CallTask:
    """What runs on a partition's calls; plain values, importable by executors."""

    job: JobConfig
    engine: EngineSpec

    def __call__(self, batches: Iterator[tuple[pa.Array[Any], ...]]) -> Iterator[pa.Array[Any]]:
        client = process_engines.client(self.engine)
        try:
            yield from generate_calls(batches, job=self.job, client=client)
        finally:
            client.close()


def _arrow_function(job: JobConfig, *, session: SparkSession) -> Callable[..., Column]:
    """Only ``task`` travels by value; everything that keeps an engine is imported by the executor."""
    check_session(session, job)
    task = CallTask(job, engine_spec(session, job))

    def dspark_generate(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:  # type: ignore[type-arg]
        return task(batches)

    function = F.arrow_udf(dspark_generate, returnType=struct_type(job)).asNondeterministic()
    return cast("Callable[..., Column]", function)


def _sql_type(kind: DataType) -> str:
    """A type as SQL reads it; a JSON schema may have names for its fields that only quotes make names of SQL."""
    if isinstance(kind, ArrayType):
        return f"ARRAY<{_sql_type(kind.elementType)}>"
    if not isinstance(kind, StructType):
        return str(kind.simpleString())
    fields = [f"`{field.name.replace('`', '``')}`: {_sql_type(field.dataType)}" for field in kind]
    return f"STRUCT<{', '.join(fields)}>"


def _default(argument: str) -> str:
    return "" if argument == "prompt" else " DEFAULT NULL"
