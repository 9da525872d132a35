"""A shard that has the engine to itself, so that the rows which break an engine are known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import pyarrow as pa

from dspark_batch.batch.faults import Trial
from dspark_batch.batch.results import ShardResult, table_stats
from dspark_batch.batch.rows import ShardInput
from dspark_batch.core import ErrorCode, RowError


class NoteStep(Protocol):
    """Notes rows outside of this process before they are tried; see ``FaultLog.note_step``."""

    def __call__(self, rows: range, *, works: bool) -> None: ...


class EngineGate:
    """Lets shards into an engine together, or one of them alone. Who wants to be alone lets no more others in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = 0
        self._num_alone = 0
        """Those that wait to be alone, and the one that is."""

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._num_alone == 0)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._num_alone += 1
            self._changed.wait_for(lambda: self._num_inside == 0)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._num_alone -= 1
                self._changed.notify_all()


def generate_in_steps(
    shard: ShardInput,
    *,
    trial: Trial,
    generate: Callable[[ShardInput], ShardResult],
    note_step: NoteStep,
    num_samples: int,
    prefix: str,
) -> ShardResult:
    """Generate a shard step by step, in an engine that has nothing else. Rows known to break engines fail untried."""
    parts: dict[int, ShardResult] = {}
    works = False
    for rows in trial.steps(shard.table.num_rows):
        note_step(rows, works=works)
        part = generate(_rows_of(shard, rows, trial=trial))
        works = works or part.stats.num_failed_rows < part.stats.num_rows
        parts[rows.start] = part
    note_step(range(0), works=works)
    ordered = [part for _, part in sorted(parts.items())]
    table = pa.concat_tables([part.table for part in ordered]).combine_chunks()
    num_copied_rows = sum(part.stats.num_copied_rows for part in ordered)
    stats = table_stats(table, num_samples=num_samples, prefix=prefix, num_copied_rows=num_copied_rows)
    return ShardResult(key=shard.key, table=table, stats=stats)


def _rows_of(shard: ShardInput, rows: range, *, trial: Trial) -> ShardInput:
    return ShardInput(
        key=shard.key,
        table=shard.table.slice(rows.start, len(rows)),
        ids=shard.ids[rows.start : rows.stop],
        failures={row - rows.start: _error(fault) for row, fault in trial.faults.items() if row in rows},
    )


def _error(fault: str) -> RowError:
    message = f"the engine breaks over this row, also where it has nothing else: {fault}"
    return RowError(code=ErrorCode.ENGINE_ERROR, message=message, retryable=True)
