"""``--preview N``: the first prompts as the model gets them, and their rows, generated in this process."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from dspark_batch.core import Request, RowError
from dspark_batch.job.config import ConfigLike
from dspark_batch.job.loader import absolute_paths, load_config
from dspark_batch.job.outcome import ExitCode, Outcome
from dspark_batch.job.prepare import check_columns
from dspark_batch.job.progress import counted
from dspark_batch.job.summary import format_rows, shown_columns

if TYPE_CHECKING:
    from dspark_batch.batch.contract import RowEngine
    from dspark_batch.batch.rows import ShardInput
    from dspark_batch.batch.shards import Plan, Shard

NUM_PROMPTS = 3


def preview_job(
    config: ConfigLike, *, overrides: Sequence[str] = (), num_rows: int, progress: TextIO | None = None
) -> Outcome:
    """Generate the first ``num_rows`` rows of the input and show them. Progress goes to stderr unless given.

    The output is neither written nor looked at, so that prompts can be tried beside a run. Raises as ``run_job``.
    """
    from dspark_batch.batch.engines import configured_factory, make_engine
    from dspark_batch.batch.planning import plan_input
    from dspark_batch.batch.prompts import PromptRenderer
    from dspark_batch.batch.reader import ShardReader
    from dspark_batch.batch.worker import BatchWorker

    job = absolute_paths(load_config(config, overrides=overrides))
    plan = plan_input(job)
    check_columns(job, plan)
    reader = ShardReader(job, plan_schema=plan.schema)
    shard = _first_rows(plan, reader.read, num_rows=num_rows)
    stream = progress or sys.stderr
    _say(stream, f"loading {job.model.target}")
    engine = make_engine(job.engine_config(), factory=configured_factory())
    try:
        renderer = PromptRenderer(
            job.prompt,
            sampling=job.sampling_params(),
            input_schema=reader.schema,
            has_chat_template=engine.has_chat_template,
        )
        prompts = renderer.render_table(shard.table.slice(0, NUM_PROMPTS), ids=shard.ids[:NUM_PROMPTS])
        lines = list(map(_show_prompt, shard.ids, _as_the_model_gets_them(prompts, engine)))
        _say(stream, f"generating {counted(len(shard.ids), 'row')}")
        worker = BatchWorker(engine, config=job, input_schema=reader.schema)
        result = next(iter(worker.run_shards([shard])))
    finally:
        engine.close()
        reader.close()
    lines += [
        f"{counted(result.stats.num_rows, 'generated row')}:",
        *format_rows(result.table, columns=shown_columns(job, plan)),
    ]
    return Outcome(code=ExitCode.OK, text="\n".join(lines))


def _say(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _as_the_model_gets_them(
    prompts: Iterable[Request | RowError], engine: RowEngine
) -> Iterator[tuple[str, int] | RowError]:
    """Nothing of an engine that cannot show them."""
    from dspark_batch.batch.contract import ShowingEngine

    if isinstance(engine, ShowingEngine):
        for prompt in prompts:
            yield engine.show_prompt(prompt) if isinstance(prompt, Request) else prompt


def _first_rows(plan: Plan, read: Callable[[Shard], ShardInput], *, num_rows: int) -> ShardInput:
    import pyarrow as pa

    from dspark_batch.batch.rows import ShardInput

    tables: list[pa.Table] = []
    ids: list[str] = []
    for planned in plan.shards:
        shard = read(planned)
        tables.append(shard.table)
        ids += shard.ids
        if len(ids) >= num_rows:
            break
    table = pa.concat_tables(tables).slice(0, num_rows) if tables else plan.schema.empty_table()
    return ShardInput(key="preview", table=table, ids=tuple(ids[:num_rows]))


def _show_prompt(row_id: str, shown: tuple[str, int] | RowError) -> str:
    if isinstance(shown, RowError):
        return f"prompt of row {row_id}:\n  error {shown.code}: {shown.message}"
    text, num_tokens = shown
    return f"prompt of row {row_id}, {num_tokens} tokens:\n{textwrap.indent(text, '  ', lambda line: True)}"
