"""``--preview N``: the first prompts as the model sees them, and their rows, generated in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dspark_batch.core import Request, RowError
from dspark_batch.job.config import ConfigLike
from dspark_batch.job.outcome import ExitCode, Outcome
from dspark_batch.job.prepare import PreparedRun, prepare
from dspark_batch.job.summary import format_rows, shown_columns

if TYPE_CHECKING:
    from dspark_batch.batch.rows import ShardInput
    from dspark_batch.batch.shards import Shard

NUM_PROMPTS = 3


def preview_job(config: ConfigLike, *, overrides: Sequence[str] = (), num_rows: int) -> Outcome:
    """Generate the first ``num_rows`` rows and show them; nothing is written. Raises as ``run_job``."""
    from dspark_batch.batch.engines import make_engine
    from dspark_batch.batch.prompts import PromptRenderer
    from dspark_batch.batch.reader import ShardReader
    from dspark_batch.batch.worker import BatchWorker

    run = prepare(config, overrides=overrides)
    config = run.config
    reader = ShardReader(config, plan_schema=run.plan.schema)
    shard = _first_rows(run, reader.read, num_rows=num_rows)
    engine = make_engine(config.engine_config(), factory=run.engine_factory)
    try:
        renderer = PromptRenderer(
            config.prompt,
            sampling=config.sampling.to_params(),
            input_schema=reader.schema,
            has_chat_template=engine.has_chat_template,
        )
        prompts = list(renderer.render_table(shard.table.slice(0, NUM_PROMPTS), ids=shard.ids[:NUM_PROMPTS]))
        worker = BatchWorker(engine, config=config, input_schema=reader.schema)
        result = next(iter(worker.run_shards([shard])))
    finally:
        engine.close()
        reader.close()
    lines = [line for row_id, prompt in zip(shard.ids, prompts, strict=False) for line in _show_prompt(row_id, prompt)]
    lines += [f"{result.stats.num_rows} generated rows:", *format_rows(result.table, columns=shown_columns(run))]
    return Outcome(code=ExitCode.OK, text="\n".join(lines))


def _first_rows(run: PreparedRun, read: Callable[[Shard], ShardInput], *, num_rows: int) -> ShardInput:
    import pyarrow as pa

    from dspark_batch.batch.rows import ShardInput

    tables: list[pa.Table] = []
    ids: list[str] = []
    for planned in run.plan.shards:
        shard = read(planned)
        tables.append(shard.table)
        ids += shard.ids
        if len(ids) >= num_rows:
            break
    table = pa.concat_tables(tables).slice(0, num_rows) if tables else run.plan.schema.empty_table()
    return ShardInput(key="preview", table=table, ids=tuple(ids[:num_rows]))


def _show_prompt(row_id: str, prompt: Request | RowError) -> list[str]:
    head = f"prompt of row {row_id}:"
    if not isinstance(prompt, Request):
        return [head, f"  error {prompt.code}: {prompt.message}"]
    if prompt.messages is not None:
        return [head, *(f"  [{message.role}] {message.content}" for message in prompt.messages)]
    return [head, f"  {prompt.prompt if prompt.prompt is not None else list(prompt.prompt_token_ids or ())}"]
