"""The end of a run: what was committed is checked once more, published to its table, swapped in, and marked."""

from __future__ import annotations

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.lease import check_epoch
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.planning import is_finished, mark_finished
from dspark_batch.batch.publication import table_schema
from dspark_batch.batch.reader import columns_to_read
from dspark_batch.batch.schema import row_schema
from dspark_batch.batch.shards import Plan
from dspark_batch.batch.swap import begin_swap, finish_swap
from dspark_batch.errors import OutputError
from dspark_batch.job.config import JobConfig


def finish_run(run: RunStore, *, plan: Plan, config: JobConfig) -> None:
    """Bring a run whose shards are all committed to its end. Each step may be repeated after a crash.

    Raises:
        OutputError: shards are no longer committed (their files changed), or the table cannot be written.
        LeaseLostError: another run has taken over.
    """
    check_epoch(run.store, run.ticket.epoch)
    committed = run.committed()
    missing = [shard.name for shard in plan.shards if shard.name not in committed]
    if missing:
        raise OutputError(
            f"{run.path}: {len(missing)} shards were committed and are not any more, such as {missing[0]}; "
            "run the same command again to make them"
        )
    entries = [committed[shard.name] for shard in plan.shards]
    if config.output.format != "parquet":
        _publish(run, committed, plan=plan, config=config)
    elif not committed:
        run.keep_columns(row_schema(config, input_schema=columns_to_read(config, schema=plan.schema)).output)
    if run.mode == "overwrite":
        is_table = config.output.format != "parquet"
        begin_swap(run.store, files=None if is_table else [entry.file for entry in entries])
        finish_swap(run.store)
        run.after_swap()
    mark_finished(run, plan)
    run.finish()


def is_complete(run: RunStore, *, plan: Plan) -> bool:
    """Whether nothing of ``finish_run`` is left to do."""
    return is_finished(run, plan) and run.has_success()


def _publish(run: RunStore, entries: dict[str, ManifestEntry], *, plan: Plan, config: JobConfig) -> None:
    schema = table_schema(config, plan_schema=plan.schema)
    if config.output.format == "delta":
        from dspark_batch.batch.delta import publish_delta

        publish_delta(run, entries, schema=schema)
    else:
        from dspark_batch.batch.iceberg import publish_iceberg

        publish_iceberg(run, entries, section=config.output, schema=schema)
