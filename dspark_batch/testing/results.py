"""Totals of shards for tests that commit tables of their own making."""

from __future__ import annotations

from dspark_batch.batch.results import ShardStats


def stats_of(num_rows: int, *, num_failed_rows: int = 0) -> ShardStats:
    """Totals of a shard of so many rows, one token each."""
    return ShardStats(
        num_rows=num_rows,
        num_output_rows=num_rows,
        num_failed_rows=num_failed_rows,
        num_retryable_rows=0,
        num_copied_rows=0,
        num_prompt_tokens=num_rows,
        num_generated_tokens=num_rows,
        num_rounds=num_rows,
        num_drafted_tokens=0,
        num_accepted_tokens=0,
    )
