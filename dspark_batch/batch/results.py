"""What a worker hands back for one shard: the finished table and its totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.schema import RowSchema, result_columns
from dspark_batch.core import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """Totals of one shard. Rows are input rows; a row failed when any of its samples did; tokens sum over samples.

    ``num_copied_rows`` counts rows that took the result of an equal prompt; their tokens are included in the totals.
    """

    num_rows: int
    num_output_rows: int
    num_failed_rows: int
    num_retryable_rows: int
    num_copied_rows: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_rounds: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_failed_by_code: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """A finished shard: its rows in input order, in the run's output schema."""

    key: str
    table: pa.Table
    stats: ShardStats


def assemble(
    shard: ShardInput, rows: Sequence[tuple[Result, ...]], *, schema: RowSchema, num_samples: int, num_copied_rows: int
) -> ShardResult:
    """Put the results (per row, one per sample, by sample index) beside the carried columns."""
    assert len(rows) == shard.table.num_rows
    assert all(len(row) == num_samples for row in rows)
    carried = shard.table.select(list(schema.carried))
    if num_samples > 1:
        carried = carried.take(np.repeat(np.arange(len(rows), dtype=np.int64), num_samples))
    flat = [result for row in rows for result in row]
    columns: list[Any] = [*carried.columns, *result_columns(flat, schema=schema)]
    table = pa.Table.from_arrays(columns, schema=schema.output)
    return ShardResult(key=shard.key, table=table, stats=_stats(rows, flat=flat, num_copied_rows=num_copied_rows))


def _stats(rows: Sequence[tuple[Result, ...]], *, flat: Sequence[Result], num_copied_rows: int) -> ShardStats:
    errors = [[result.error for result in row if result.error is not None] for row in rows]
    failed = [row for row in errors if row]
    return ShardStats(
        num_rows=len(rows),
        num_output_rows=len(flat),
        num_failed_rows=len(failed),
        num_retryable_rows=sum(any(error.retryable for error in row) for row in failed),
        num_copied_rows=num_copied_rows,
        num_prompt_tokens=sum(result.num_prompt_tokens for result in flat),
        num_generated_tokens=sum(result.num_generated_tokens for result in flat),
        num_rounds=sum(result.num_rounds for result in flat),
        num_drafted_tokens=sum(result.num_drafted_tokens for result in flat),
        num_accepted_tokens=sum(result.num_accepted_tokens for result in flat),
        num_failed_by_code=dict(sorted(Counter(row[0].code.value for row in failed).items())),
    )
