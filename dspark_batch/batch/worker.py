"""One engine over the rows of several shards: rows in, the same rows out with generated columns. For every driver."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from dspark_batch.batch.contract import RowEngine
from dspark_batch.batch.dedupe import Deduper, PromptKey
from dspark_batch.batch.ordering import feed_order
from dspark_batch.batch.prompts import PromptRenderer, check_prompt
from dspark_batch.batch.results import ShardResult, assemble
from dspark_batch.batch.rows import ShardInput, check_id_column
from dspark_batch.batch.schema import RowSchema, row_schema
from dspark_batch.core import Request, Result, RowError
from dspark_batch.errors import ConfigError
from dspark_batch.job.config import JobConfig

QUEUE_FACTOR = 2
"""Samples kept in the engine, as a multiple of its concurrency: with twice as many, no slot waits for a row."""


class _OpenShard:
    """A shard whose rows are being generated."""

    def __init__(self, shard: ShardInput, *, outcomes: Sequence[Request | RowError]) -> None:
        self.input = shard
        self.rows: list[tuple[Result, ...] | None] = [None] * shard.table.num_rows
        self.num_missing = shard.table.num_rows
        self.num_copied_rows = 0
        self.unfed = iter([(row, outcomes[row]) for row in feed_order(outcomes)])

    def put(self, row: int, results: tuple[Result, ...]) -> None:
        assert self.rows[row] is None, f"shard {self.input.key}: row {row} came out twice"
        self.rows[row] = results
        self.num_missing -= 1


class BatchWorker:
    """Feeds the rows of one or several shards into one continuous batch. Not thread-safe; see ``WorkerService``.

    The worker drives the engine but does not own it: closing the engine is the caller's.

    Raises:
        ConfigError: the config does not fit the input schema; every problem is listed.
    """

    def __init__(self, engine: RowEngine, *, config: JobConfig, input_schema: pa.Schema) -> None:
        self.schema = check_schema(config, input_schema=input_schema)
        self._engine = engine
        self._num_samples = config.sampling.n
        self._renderer = PromptRenderer(
            config.prompt,
            sampling=config.sampling_params(),
            input_schema=input_schema,
            has_chat_template=engine.has_chat_template,
        )
        self._deduper = Deduper()
        self._open: dict[str, _OpenShard] = {}
        self._feeding: deque[_OpenShard] = deque()
        self._in_engine: dict[int, tuple[_OpenShard, int, PromptKey | None]] = {}
        self._samples: dict[int, list[Result]] = {}
        self._finished: deque[ShardResult] = deque()

    @property
    def output_schema(self) -> pa.Schema:
        return self.schema.output

    @property
    def num_open_shards(self) -> int:
        """Shards that were opened and have not been taken."""
        return len(self._open) + len(self._finished)

    @property
    def wants_rows(self) -> bool:
        """Whether the engine's queue has room and no open shard has rows left to fill it."""
        return not self._feeding and self._engine.num_unfinished < self._target

    def process(self, batch: pa.RecordBatch, *, ids: Sequence[str]) -> pa.RecordBatch:
        """Generate for one batch and wait for it. Rows come back in order; with n > 1 a row's samples are adjacent.

        Raises EngineError when the engine broke.
        """
        shard = ShardInput(key="batch", table=pa.Table.from_batches([batch]), ids=tuple(ids))
        table = next(iter(self.run_shards([shard]))).table
        columns: list[Any] = [column.combine_chunks() for column in table.columns]
        return pa.RecordBatch.from_arrays(columns, schema=table.schema)

    def run_shards(self, shards: Iterable[ShardInput], *, max_open_shards: int | None = None) -> Iterator[ShardResult]:
        """Generate for many shards, giving each as it finishes (not in the order in which they came).

        The next shard is taken as soon as the rows at hand cannot fill the engine's queue, so that the batch never
        drains between shards. Open shards are bounded by the engine's queue, as each has a row in it; a smaller
        ``max_open_shards`` saves memory but may leave slots idle while the last rows of the open shards decode.
        Raises EngineError when the engine broke; the worker is of no use after that.
        """
        assert max_open_shards is None or max_open_shards >= 1
        source = iter(shards)
        has_more = True
        while has_more or self.num_open_shards:
            while has_more and self.wants_rows and (max_open_shards is None or len(self._open) < max_open_shards):
                shard = next(source, None)
                has_more = shard is not None
                if shard is not None:
                    self.open(shard)
            self.advance()
            yield from self.take_finished()

    def open(self, shard: ShardInput) -> None:
        """Take a shard's rows into the queue, in the order that suits the engine, and fill the engine from it."""
        assert shard.key not in self._open, f"shard {shard.key} is open already"
        rendered = self._renderer.render_table(shard.table, ids=shard.ids)
        outcomes = [shard.failures.get(row, outcome) for row, outcome in enumerate(rendered)]
        opened = _OpenShard(shard, outcomes=outcomes)
        self._open[shard.key] = opened
        self._feeding.append(opened)
        self._feed()

    def advance(self) -> None:
        """Run one round, if there is anything to run, and top up the engine. Raises EngineError when it broke."""
        if self._engine.num_unfinished == 0:
            assert not self._in_engine, f"the engine lost {len(self._in_engine)} requests"
            return
        for ticket, result in self._engine.step():
            self._receive(ticket, result)
        self._feed()

    def take_finished(self) -> list[ShardResult]:
        """The shards that finished since the last call."""
        taken = list(self._finished)
        self._finished.clear()
        return taken

    def check_integrity(self) -> None:
        """Rows in the engine belong to open shards; open shards miss rows; equal prompts have open owners."""
        self._deduper.check_integrity()
        assert all(self._open[shard.input.key] is shard for shard, _, _ in self._in_engine.values())
        assert self._samples.keys() <= self._in_engine.keys()
        assert all(shard.num_missing == shard.rows.count(None) > 0 for shard in self._open.values())

    @property
    def _target(self) -> int:
        return self._engine.max_concurrency * QUEUE_FACTOR

    def _feed(self) -> None:
        room = self._target - self._engine.num_unfinished
        while self._feeding and room > 0:
            shard = self._feeding[0]
            pair = next(shard.unfed, None)
            if pair is None:
                self._feeding.popleft()
                self._close_if_done(shard)
            elif self._submit(shard, pair[0], pair[1]):
                room -= self._num_samples

    def _submit(self, shard: _OpenShard, row: int, outcome: Request | RowError) -> bool:
        """Whether the row went into the engine."""
        if isinstance(outcome, RowError):
            shard.put(row, self._failed(shard.input.ids[row], outcome))
            return False
        key = self._deduper.key(outcome)
        if key is not None:
            claimed = self._deduper.claim(key, shard=shard.input.key, row=row, row_id=outcome.id)
            if claimed is not True:
                shard.num_copied_rows += 1
                if claimed is not False:
                    shard.put(row, claimed)
                return False
        self._in_engine[self._engine.add(outcome)] = (shard, row, key)
        return True

    def _failed(self, row_id: str, error: RowError) -> tuple[Result, ...]:
        request = Request(id=row_id, prompt="")
        return tuple(Result.failed(request, error, sample=sample) for sample in range(self._num_samples))

    def _receive(self, ticket: int, result: Result) -> None:
        results: tuple[Result, ...] = (result,)
        if self._num_samples > 1:
            samples = self._samples.setdefault(ticket, [])
            samples.append(result)
            if len(samples) < self._num_samples:
                return
            results = tuple(sorted(self._samples.pop(ticket), key=lambda sample: sample.sample))
            assert [sample.sample for sample in results] == list(range(self._num_samples))
        shard, row, key = self._in_engine.pop(ticket)
        waiting = () if key is None else self._deduper.finish(key, results)
        self._put(shard, row, results)
        for place_key, place_row, place_results in waiting:
            self._put(self._open[place_key], place_row, place_results)

    def _put(self, shard: _OpenShard, row: int, results: tuple[Result, ...]) -> None:
        shard.put(row, results)
        if shard.num_missing == 0:
            self._close_if_done(shard)

    def _close_if_done(self, shard: _OpenShard) -> None:
        if shard.num_missing or shard.input.key not in self._open or shard in self._feeding:
            return
        del self._open[shard.input.key]
        self._deduper.forget(shard.input.key)
        rows = [row for row in shard.rows if row is not None]
        result = assemble(
            shard.input,
            rows,
            schema=self.schema,
            num_samples=self._num_samples,
            num_copied_rows=shard.num_copied_rows,
        )
        self._finished.append(result)


def check_schema(config: JobConfig, *, input_schema: pa.Schema) -> RowSchema:
    """Check everything in a config that depends on the input's columns; the run's columns where all is well.

    Raises ConfigError with every problem found. Needs no engine, so that a dry run can call it.
    """
    problems = check_prompt(config.prompt, input_schema=input_schema)
    problems += check_id_column(config.input.id, schema=input_schema)
    schema = None
    try:
        schema = row_schema(config, input_schema=input_schema)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    assert schema is not None
    return schema
