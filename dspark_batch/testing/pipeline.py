"""One start of a run as a driver does it, in this process and with a chosen store and engine; for crash tests."""

from __future__ import annotations

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.fingerprint import fingerprint_fields
from dspark_batch.batch.finish import finish_run, is_complete
from dspark_batch.batch.planning import resolve_plan
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.store import Store
from dspark_batch.batch.swap import finish_swap
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.scripted_engine import ScriptedEngine


def start_run(config: JobConfig, *, store: Store | None = None, engine: ScriptedEngine | None = None) -> int:
    """Plan, read, generate, commit and finish; the number of shards that were made."""
    output = config.output
    run = RunStore(output.path, store=store, mode=output.mode, format=output.format)
    if run.is_swapping():
        finish_swap(run.store)
    resolved = resolve_plan(
        config,
        run=run,
        fields_of=lambda digest: fingerprint_fields(config, weights_fingerprint="scripted", input_digest=digest),
    )
    run.open(resolved.fields, anew=resolved.begins_anew)
    resolved.save(run)
    plan = resolved.plan
    done = run.committed()
    todo = [shard for shard in plan.shards if shard.name not in done]
    if todo:
        run.withdraw_success()
        reader = ShardReader(config, plan_schema=plan.schema)
        worker = BatchWorker(engine or ScriptedEngine(), config=config, input_schema=reader.schema)
        for finished in worker.run_shards(reader.read(shard) for shard in todo):
            run.commit(finished)
        reader.close()
    if todo or not is_complete(run, plan=plan):
        finish_run(run, plan=plan, config=config)
    return len(todo)
