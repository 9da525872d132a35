"""What a Spark task needs of an engine, wherever that engine lives: rows in, a future of the added columns out."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from dspark_batch.engine.config import EngineConfig
from dspark_batch.job.config import JobConfig
from dspark_batch.provenance import fingerprint
from dspark_batch.spark.config import SparkSection

ROW_ID_COLUMN = "__dspark_row_id"
"""Column of a chunk that holds the rows' identities; never part of a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Which engine a task needs; plain values that travel inside a closure to every executor.

    ``executor_cores`` is None where the driver cannot know it. ``factory`` names another engine than the real one.
    """

    config: EngineConfig
    settings: SparkSection
    factory: str | None = None
    executor_cores: int | None = None

    def fingerprint(self) -> str:
        """Equal for specs that can share an engine (hex)."""
        return fingerprint({"engine": self.config.model_dump(mode="json"), "factory": self.factory})


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some rows of a task: the columns that the prompt reads, and ``ROW_ID_COLUMN`` (text, never NULL).

    ``job`` says how they are generated; chunks of other jobs may be in the engine at the same time.
    """

    job: JobConfig
    table: pa.Table

    @property
    def num_rows(self) -> int:
        return int(self.table.num_rows)


class EngineClient(Protocol):
    """An engine as one process sees it. Thread-safe."""

    @property
    def max_concurrency(self) -> int:
        """Samples decoded together."""
        ...

    def submit(self, chunk: Chunk) -> Future[pa.Table]:
        """Generate a chunk: only the added columns, rows in order, with ``sampling.n`` rows for every row.

        The future raises EngineError when the engine broke, ConfigError when the job does not fit the engine.
        """
        ...

    def release(self, futures: Collection[Future[pa.Table]]) -> None:
        """Give up chunks that nobody waits for; those that have begun may still be decoded."""
        ...

    def close(self) -> None: ...
