"""What a worker hands back for one shard: the finished table and its totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.schema import RowSchema, result_columns
from dspark_batch.batch.utf8 import valid_utf8
from dspark_batch.core import FinishReason, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """Totals of one shard. Rows are input rows; a row failed when any of its samples did; tokens sum over samples.

    ``num_copied_rows`` counts rows that took the result of an equal prompt; their tokens are included in the totals.
    ``num_cut_samples``: those that ``sampling.max_new_tokens`` ended.
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
    num_cut_samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """A finished shard: its rows in input order, in the run's output schema.

    ``retried`` are the totals of the rows that were generated again, where the others are of an earlier commit.
    """

    key: str
    table: pa.Table
    stats: ShardStats
    retried: ShardStats | None = None


def assemble(
    shard: ShardInput, rows: Sequence[tuple[Result, ...]], *, schema: RowSchema, num_samples: int, num_copied_rows: int
) -> ShardResult:
    """Put the results (per row, one per sample, by sample index) beside the carried columns, as valid UTF-8."""
    assert len(rows) == shard.table.num_rows
    assert all(len(row) == num_samples for row in rows)
    carried = shard.table.select(list(schema.carried))
    carried = pa.Table.from_arrays(list(map(valid_utf8, carried.columns)), schema=carried.schema)
    if num_samples > 1:
        carried = carried.take(np.repeat(np.arange(len(rows), dtype=np.int64), num_samples))
    flat = [result for row in rows for result in row]
    columns: list[Any] = [*carried.columns, *result_columns(flat, schema=schema)]
    table = pa.Table.from_arrays(columns, schema=schema.output)
    stats = table_stats(table, num_samples=num_samples, num_copied_rows=num_copied_rows, prefix=schema.prefix)
    return ShardResult(key=shard.key, table=table, stats=stats)


def table_stats(table: pa.Table, *, num_samples: int, num_copied_rows: int, prefix: str) -> ShardStats:
    """The totals of a finished table of ``num_samples`` rows per input row, from its columns."""
    errors = table.column(f"{prefix}error")
    failed: dict[int, list[dict[str, Any]]] = {}
    if errors.null_count < table.num_rows:
        places = np.flatnonzero(np.asarray(errors.is_valid())).tolist()
        known: list[Any] = errors.drop_null().to_pylist()
        for place, error in zip(places, known, strict=True):
            failed.setdefault(place // num_samples, []).append(error)

    def total(name: str) -> int:
        return pc.sum(table.column(f"{prefix}{name}")).as_py() or 0

    is_cut = pc.equal(table.column(f"{prefix}finish_reason"), pa.scalar(FinishReason.LENGTH.value))
    return ShardStats(
        num_rows=table.num_rows // num_samples,
        num_output_rows=table.num_rows,
        num_failed_rows=len(failed),
        num_retryable_rows=sum(any(error["retryable"] for error in row) for row in failed.values()),
        num_copied_rows=num_copied_rows,
        num_prompt_tokens=total("num_prompt_tokens"),
        num_generated_tokens=total("num_generated_tokens"),
        num_rounds=total("num_rounds"),
        num_drafted_tokens=total("num_drafted_tokens"),
        num_accepted_tokens=total("num_accepted_tokens"),
        num_failed_by_code=dict(sorted(Counter(row[0]["code"] for row in failed.values()).items())),
        num_cut_samples=int(np.count_nonzero(np.asarray(is_cut))),
    )
