"""The folder through which a Spark table goes to a job and back: what was done there, and which types survive."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark.sql import types as T  # noqa: N812

from dspark_batch.batch.store import Store
from dspark_batch.errors import ConfigError, OutputError, Problem

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STATE_FILE = "stages.json"
TIMESTAMP_TYPE = "spark.sql.parquet.outputTimestampType"

_NULL_KEYS = frozenset({"nullable", "containsNull", "valueContainsNull"})

_PLAIN_TYPES = (
    T.StringType,
    T.CharType,
    T.VarcharType,
    T.BinaryType,
    T.BooleanType,
    T.ByteType,
    T.ShortType,
    T.IntegerType,
    T.LongType,
    T.FloatType,
    T.DoubleType,
    T.DecimalType,
    T.DateType,
    T.TimestampType,
    T.TimestampNTZType,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """How far a staging folder has come. ``schema`` is the source's, as Spark's JSON.

    ``settings`` are those that decide the rows of the result, by dotted config name.
    """

    source: str
    target: str
    schema: str
    settings: Mapping[str, object]
    is_staged: bool = False
    is_landing: bool = False
    is_landed: bool = False


class StagingFolder:
    """A folder that Spark, this process and the job's workers all reach under one path or URI."""

    def __init__(self, path: str) -> None:
        local = "://" not in path
        self.root = str(Path(path).absolute()) if local else path.rstrip("/")
        self._is_local = local
        self._store = Store(self.for_arrow(""))

    def for_spark(self, name: str) -> str:
        """Where Spark finds an entry of the folder; local paths with their scheme, as Spark's default may be HDFS."""
        return f"file://{self.root}/{name}" if self._is_local else f"{self.root}/{name}"

    def for_arrow(self, name: str) -> str:
        """Where pyarrow finds it; it calls S3 by another scheme."""
        root = "s3://" + self.root[len("s3a://") :] if self.root.startswith("s3a://") else self.root
        return f"{root}/{name}".rstrip("/")

    def load(self) -> Stages | None:
        """What has been done, or None in a new folder. Raises OutputError where the record cannot be read."""
        data = self._store.read(STATE_FILE)
        if data is None:
            return None
        try:
            return Stages(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{self.root}/{STATE_FILE} is not of this version: {error}; use another staging"
            ) from error

    def save(self, stages: Stages) -> None:
        """Record a step; whole or not at all."""
        text = json.dumps(asdict(stages), indent=1, sort_keys=True)
        self._store.write(STATE_FILE, text.encode(), staging=f".{STATE_FILE}.tmp")


@contextmanager
def microsecond_timestamps(spark: SparkSession) -> Iterator[None]:
    """Parquet files written meanwhile hold timestamps that other readers understand; Spark's default (INT96) does not.

    The session's own setting is restored.
    """
    before = spark.conf.get(TIMESTAMP_TYPE, None)
    spark.conf.set(TIMESTAMP_TYPE, "TIMESTAMP_MICROS")
    try:
        yield
    finally:
        if before is None:
            spark.conf.unset(TIMESTAMP_TYPE)
        else:
            spark.conf.set(TIMESTAMP_TYPE, before)


def check_types(schema: T.StructType) -> None:
    """Raises ConfigError for every column whose type would not come back from Parquet as it went."""
    problems = [
        Problem(
            "source",
            f"column {field.name!r} has type {field.dataType.simpleString()}, which does not survive the "
            "way through Parquet; cast or drop it first",
            "argument",
        )
        for field in schema
        if not _survives(field.dataType)
    ]
    if problems:
        raise ConfigError(problems)


def without_not_null(schema: T.StructType) -> T.StructType:
    """The schema with NULL allowed everywhere, as in every table of files that Spark reads."""
    loosened: T.StructType = T.StructType.fromJson(_with_null(schema.jsonValue()))
    return loosened


def _with_null(value: Any) -> Any:
    """A schema's JSON, with what says whether NULL may occur set to yes."""
    if isinstance(value, list):
        return [_with_null(entry) for entry in value]
    if isinstance(value, dict):
        return {name: True if name in _NULL_KEYS else _with_null(entry) for name, entry in value.items()}
    return value


def _survives(kind: T.DataType) -> bool:
    if isinstance(kind, T.ArrayType):
        return _survives(kind.elementType)
    if isinstance(kind, T.MapType):
        return _survives(kind.keyType) and _survives(kind.valueType)
    if isinstance(kind, T.StructType):
        return len(kind) > 0 and all(_survives(field.dataType) for field in kind)
    return isinstance(kind, _PLAIN_TYPES)
