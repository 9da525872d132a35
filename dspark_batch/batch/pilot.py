"""A pilot of a job: rows drawn at random from the whole input, and what the engine's steps over them take."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dspark_batch.batch.contract import MeasuredEngine, RowEngine
from dspark_batch.batch.live import CountingEngine
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.rows import ShardInput, row_ids
from dspark_batch.batch.shards import Plan
from dspark_batch.core import Result

MOST_DRAWN = 64
"""Rows that are looked at for each one that is wanted, where a filter drops most of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Rows that pass the filter, in random order. Of ``num_drawn`` rows of the input that were looked at,
    ``num_passing`` do."""

    table: pa.Table
    ids: tuple[str, ...]
    num_drawn: int
    num_passing: int

    def rows(self, start: int, stop: int) -> ShardInput:
        """Some of them, to be generated."""
        return ShardInput(key="pilot", table=self.table.slice(start, stop - start), ids=self.ids[start:stop])


def draw_rows(plan: Plan, reader: ShardReader, *, id_column: str | None, num_rows: int, seed: int) -> Drawn:
    """At most ``num_rows`` rows, each of the input with the same chance; fewer where the input has no more, or where
    too few of ``MOST_DRAWN`` times as many pass the filter. ``plan`` is over whole files. Raises InputError."""
    chance = random.Random(seed)
    places = chance.sample(range(plan.num_rows), min(plan.num_rows, MOST_DRAWN * num_rows))
    tables: list[pa.Table] = [reader.schema.empty_table()]
    ids: list[str] = []
    num_drawn = 0
    while len(ids) < num_rows and num_drawn < len(places):
        # As many as before once more, so that no shard is read often.
        more = sorted(places[num_drawn : num_drawn + max(num_rows, num_drawn)])
        num_drawn += len(more)
        for part in _rows_at(more, plan, reader, id_column=id_column):
            tables.append(part.table)
            ids += part.ids
    order = chance.sample(range(len(ids)), min(num_rows, len(ids)))
    table = pa.concat_tables(tables).take(pa.array(order, pa.int64()))
    return Drawn(table=table, ids=tuple([ids[place] for place in order]), num_drawn=num_drawn, num_passing=len(ids))


def _rows_at(places: Sequence[int], plan: Plan, reader: ShardReader, *, id_column: str | None) -> Iterator[ShardInput]:
    """The rows at these places of the input, in ascending order, as far as they pass the filter."""
    start = 0
    for shard in plan.shards:
        stop = start + shard.num_rows
        inside = places[bisect_left(places, start) : bisect_left(places, stop)]
        if inside:
            table, index = reader.read_rows(shard)
            in_file = np.asarray(index, np.int64)
            wanted = np.asarray(inside, np.int64) - start + shard.row_start
            kept = np.flatnonzero(np.isin(in_file, wanted))
            table = table.take(kept)
            ids = row_ids(table, id_column=id_column, relative_file=shard.relative, row_index=in_file[kept].tolist())
            yield ShardInput(key=shard.name, table=table, ids=ids)
        start = stop


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """One step of an engine, from the end of the step before: feeding the engine is part of it.

    num_running: samples in the batch. num_rounds: those of them that decoded. num_prompt_tokens: computed in it.
    has_queue: whether samples waited for a place in the batch.
    """

    seconds: float
    num_running: int
    num_rounds: int
    num_prompt_tokens: int
    has_queue: bool


class TimedEngine(CountingEngine):
    """A ``RowEngine`` that notes what each step of another took, since ``begin``."""

    def __init__(self, engine: RowEngine, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(engine)
        self._clock = clock
        self.steps: list[TimedStep] = []
        self.begin()

    def begin(self) -> None:
        """The clock starts; what was before does not count."""
        self.steps.clear()
        self._last_s = self._clock()

    def step(self) -> list[tuple[int, Result]]:
        num_unfinished = self.num_unfinished
        num_rounds, num_prompt_tokens = self.counts.num_rounds, self._num_prompt_tokens
        finished = super().step()
        now_s = self._clock()
        num_queued = max(0, num_unfinished - self.max_concurrency)
        if isinstance(self._engine, MeasuredEngine) and self._engine.stats.last is not None:
            num_queued = self._engine.stats.last.num_queued
        self.steps.append(
            TimedStep(
                seconds=now_s - self._last_s,
                num_running=num_unfinished - num_queued,
                num_rounds=self.counts.num_rounds - num_rounds,
                num_prompt_tokens=self._num_prompt_tokens - num_prompt_tokens,
                has_queue=num_queued > 0,
            )
        )
        self._last_s = now_s
        return finished

    @property
    def _num_prompt_tokens(self) -> int:
        return self._engine.stats.num_prefill_tokens if isinstance(self._engine, MeasuredEngine) else 0
