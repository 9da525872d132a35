"""``Generate``: a plain callable class for ``map_batches`` in pipelines of other people. Imports no Ray."""

from __future__ import annotations

import pyarrow as pa

from dspark_batch.batch.contract import RowEngine
from dspark_batch.batch.engines import configured_factory, make_engine
from dspark_batch.batch.rows import ShardInput, row_ids
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig

UNNAMED = "batch"
"""Stands for the file name in ids of rows without an id column."""


class Generate:
    """Adds the generated columns to Arrow batches: ``ds.map_batches(Generate, fn_constructor_kwargs={"config": ...},
    batch_format="pyarrow", batch_size=..., compute=ActorPoolStrategy(size=...))``.

    The columns are those of a run (see ``batch.schema``); a row that fails keeps its place and says why in ``error``.
    ``input.id`` names the column that identifies a row and keys its random draw; without it the draw at temperature
    above 0 depends on the row's place in its batch, so it is then refused. One engine per object; calls do not overlap.

    Args:
        config: a YAML file, its sections as a mapping, or a ``JobConfig``; ``input`` and ``output`` may be left out.
        engine_factory: ``module:function`` of another engine, for tests.

    Raises:
        ConfigError: the config is not valid, asks for what only files have (``input.filter``), or does not fit the
            columns of the first batch.
        ModelError: the model cannot be loaded.
    """

    def __init__(self, config: ConfigLike, *, engine_factory: str | None = None) -> None:
        self._config = _job(config)
        if self._config.input.id is None and not self._config.sampling_params().is_greedy:
            raise ConfigError([Problem("input.id", "is needed where sampling.temperature is above 0")])
        factory = engine_factory or configured_factory()
        self._engine: RowEngine = make_engine(self._config.engine_config(), factory=factory)
        self._worker: BatchWorker | None = None
        self._schema: pa.Schema | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the added columns, rows in the same order. Raises EngineError when the engine broke."""
        if self._worker is None or batch.schema != self._schema:
            self._worker = BatchWorker(self._engine, config=self._config, input_schema=batch.schema)
            self._schema = batch.schema
        if batch.num_rows == 0:
            return self._worker.output_schema.empty_table()
        ids = row_ids(batch, id_column=self._config.input.id, relative_file=UNNAMED, row_index=range(batch.num_rows))
        shard = ShardInput(key=UNNAMED, table=batch, ids=ids)
        return next(iter(self._worker.run_shards([shard]))).table


def _job(config: ConfigLike) -> JobConfig:
    from dspark_batch.job.rows import job_of_sections, sections_of

    values, source = sections_of(config, path=UNNAMED)
    return job_of_sections(values, source=source)
