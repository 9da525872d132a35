"""``--retry-failed``: only the rows of a committed shard that failed and may succeed are generated again."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.results import ShardResult, table_stats
from dspark_batch.batch.rows import ShardInput
from dspark_batch.errors import OutputError


def committed_table(entry: ManifestEntry, *, run: RunStore) -> pa.Table:
    """The rows of a committed shard. Raises OutputError when its file has gone or is not readable."""
    data = run.store.read(run.ticket.file_name(entry.file))
    if data is None:
        raise OutputError(f"shard {entry.shard}: its file {entry.file} has gone; run again to remake it")
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"shard {entry.shard}: {entry.file} cannot be read: {error}") from error


def retryable_rows(table: pa.Table, *, num_samples: int, prefix: str) -> list[int]:
    """Indices of the input rows of which a sample failed with a retryable error. ``num_samples`` rows per input row."""
    flags = pc.fill_null(pc.struct_field(table.column(f"{prefix}error"), "retryable"), False).to_pylist()
    return sorted({place // num_samples for place, retryable in enumerate(flags) if retryable})


def only_rows(shard: ShardInput, rows: list[int]) -> ShardInput:
    """The shard with these rows alone; their ids, and so their random draws, stay."""
    return ShardInput(key=shard.key, table=shard.table.take(pa.array(rows)), ids=tuple(shard.ids[row] for row in rows))


def merge(
    before: pa.Table, again: ShardResult, *, rows: list[int], num_samples: int, prefix: str, entry: ManifestEntry
) -> ShardResult:
    """The shard with ``rows`` taken from ``again`` and all others from ``before``, in the old order."""
    assert again.stats.num_rows == len(rows)
    place = list(range(before.num_rows))
    for position, row in enumerate(rows):
        for sample in range(num_samples):
            place[row * num_samples + sample] = before.num_rows + position * num_samples + sample
    table = pa.concat_tables([before.cast(again.table.schema), again.table]).take(pa.array(place))
    num_copied_rows = entry.stats.num_copied_rows + again.stats.num_copied_rows
    return ShardResult(
        key=entry.shard,
        table=table.combine_chunks(),
        stats=table_stats(table, num_samples=num_samples, num_copied_rows=num_copied_rows, prefix=prefix),
        retried=again.stats,
    )
