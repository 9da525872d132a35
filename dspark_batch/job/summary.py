"""What a run says when it ends, has nothing to do, or is only described."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark_batch.job.config import JobConfig
from dspark_batch.job.drive import Ending
from dspark_batch.job.outcome import ExitCode, Outcome, Totals
from dspark_batch.job.prepare import PreparedRun, Remaining
from dspark_batch.job.progress import counted, format_duration, format_speed, rows_in_shards

if TYPE_CHECKING:
    import pyarrow as pa

    from dspark_batch.batch.shards import Plan

NUM_SAMPLE_ROWS = 3
MAX_CELL_CHARS = 100
MAX_ERROR_CHARS = 240

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run whose driving ended: totals of this process (``done``) and of all committed shards (``whole``).

    ``begin_s``: when it began, as UNIX time.
    """

    run: PreparedRun
    ending: Ending
    done: Totals
    whole: Totals
    elapsed_s: float
    begin_s: float = 0.0


def ending_outcome(finished: Finished, *, about_cost: Sequence[str] = (), loaded_s: float | None = None) -> Outcome:
    """The exit code and summary for an ending. ``about_cost`` and ``loaded_s`` are what ``write_report`` gave."""
    run, whole = finished.run, finished.whole
    code = exit_code(run, whole, ending=finished.ending)
    about_rows = [*_failures(run, whole), *_cut_texts(run, whole)]
    lines = [_headline(finished), *work_done(finished, loaded_s), *about_rows]
    lines += [f"output: {run.config.output.path}", *about_cost]
    if finished.done.num_shards:
        lines += _sample_rows(run)
    return Outcome(code=code, text="\n".join(lines))


def nothing_to_do(run: PreparedRun, whole: Totals, *, retry_failed: bool) -> Outcome:
    """The outcome of a run that was complete before it began."""
    headline = f"nothing to do: all {rows_in_shards(whole.num_rows, whole.num_shards)} are committed"
    if retry_failed:
        headline += ", and no failed row may succeed on a retry" if whole.num_failed_rows else ", and no row failed"
    lines = [
        headline,
        *_failures(run, whole),
        f"output: {run.config.output.path}",
    ]
    return Outcome(code=exit_code(run, whole, ending=Ending.DONE), text="\n".join(lines))


def describe(run: PreparedRun, left: Remaining) -> Outcome:
    """The outcome of a dry run."""
    config = run.config
    facts = {
        "input": (
            f"{counted(run.plan.num_rows, 'row')} in {counted(len(run.plan.files), 'file')}, "
            f"{counted(len(run.plan.shards), 'shard')}"
        ),
        "to do": f"{planned_rows(left.num_rows, config)} in {counted(len(left.shards), 'shard')}",
        "model": config.model.target,
        "drafter": _about_drafts(config),
        "backend": config.engine.backend,
        "output": f"{config.output.path} (mode {config.output.mode})",
        "fingerprint": run.fingerprint,
    }
    width = max(map(len, facts))
    return Outcome(code=ExitCode.OK, text="\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items()))


def _about_drafts(config: JobConfig) -> str:
    if config.task == "classify":
        return "none, as sampling.choices are scored"
    return f"{config.speculation.drafter}, verification {config.speculation.verification}"


def planned_rows(num_rows: int, config: JobConfig) -> str:
    """A number of rows that a plan knows: of a filter only the shards tell, when they are read."""
    rows = counted(num_rows, "row")
    return rows if config.input.filter is None else f"at most {rows} (before input.filter)"


def exit_code(run: PreparedRun, whole: Totals, *, ending: Ending) -> ExitCode:
    """The exit code by how the run ended and by the failed rows of all its shards."""
    if ending is Ending.TOO_MANY_FAILED:
        return ExitCode.TOO_MANY_FAILED
    if ending is not Ending.DONE:
        return ExitCode.FATAL
    if _has_too_many_failed(run, whole):
        return ExitCode.TOO_MANY_FAILED
    return ExitCode(run.config.limits.exit_code_on_failed_rows) if whole.num_failed_rows else ExitCode.OK


def format_rows(table: pa.Table, *, columns: Iterable[str]) -> list[str]:
    """The columns of every row, one row a line, long values cut."""
    from dspark_batch.batch.prompts import python_values

    names = list(dict.fromkeys(columns))
    rows = zip(*(python_values(table.column(name)) for name in names), strict=True)
    return ["  " + " | ".join(map(_cell, names, row)) for row in rows]


def shown_columns(config: JobConfig, plan: Plan) -> list[str]:
    """The columns worth showing of an output row: its id, what was generated, and the error if there is one."""
    carried = config.input.columns if config.input.columns is not None else plan.schema.names
    shown = [config.input.id] if config.input.id in carried else carried[:1]
    shown = [name for name in shown if name is not None]
    added = ["probability", "error"] if config.task == "classify" else ["error"]
    added = ["token_ids", *added] if config.output.token_ids else added
    return [*shown, config.output.column, *map(config.output.name_of, added)]


def work_done(finished: Finished, loaded_s: float | None) -> list[str]:
    """What this process did, and how fast, from the moment when its first engine was loaded, where that is known."""
    done, elapsed_s = finished.done, finished.elapsed_s
    if not done.num_shards:
        return []
    load_s = 0.0 if loaded_s is None else loaded_s - finished.begin_s
    # Other machines' clocks may be wrong, and engines that serve several runs have loaded long before.
    load_s = load_s if 1 <= load_s < elapsed_s else 0.0
    line = f"this run: {rows_in_shards(done.num_rows, done.num_shards)}"
    amount, unit = done.num_rows, "rows"
    if finished.run.config.max_tokens_per_row is not None:
        line += f", {counted(done.num_generated_tokens, 'token')}"
        amount, unit = done.num_generated_tokens, "tokens"
    speed = amount / (elapsed_s - load_s) if elapsed_s > 0 else 0.0
    line += f" in {format_duration(elapsed_s)}"
    line += f", {format_duration(load_s)} of them until an engine was loaded" if load_s else ""
    line += f" ({format_speed(speed, unit)}{' from then on' if load_s else ''})"
    if done.accepted_length is not None:
        line += f", accepted length {done.accepted_length:.2f}"
    if not done.num_drafted_tokens:
        return [line]
    speculation = finished.run.config.speculation
    held = 100 * done.num_accepted_tokens / done.num_drafted_tokens
    num_drafted = counted(done.num_drafted_tokens, "token")
    drafted = f"drafter {speculation.drafter}: {num_drafted} drafted, {held:.0f} % of them accepted"
    if speculation.schedule == "auto":
        drafted += "; where drafting does not pay, rounds go without"
    return [line, drafted]


def _headline(finished: Finished) -> str:
    whole, run = finished.whole, finished.run
    progress = f"{whole.num_rows} of {planned_rows(run.plan.num_rows, run.config)} are committed"
    match finished.ending:
        case Ending.DONE:
            rows = rows_in_shards(whole.num_rows, whole.num_shards)
            if _has_too_many_failed(run, whole):
                return f"not done, too many rows failed; all {rows} are committed"
            return f"done: {rows}"
        case Ending.SIGNAL:
            return f"stopped by a signal: {progress}; the same command goes on from here"
        case Ending.GRACE_OVER:
            return f"stopped by a signal, running shards given up: {progress}; the same command goes on from here"
        case Ending.TOKEN_BUDGET:
            limit = run.config.limits.max_generated_tokens
            return (
                f"stopped at limits.max_generated_tokens={limit}: {progress}, {whole.num_generated_tokens} tokens; "
                "raise the limit and run the same command to go on"
            )
        case Ending.TIME_BUDGET:
            limit_s = run.config.limits.max_run_s
            return f"stopped at limits.max_run_s={limit_s:g}: {progress}; the same command goes on from here"
        case Ending.TOO_MANY_FAILED:
            limit_fraction = run.config.limits.max_failed_fraction
            return f"stopped, more rows failed than limits.max_failed_fraction={limit_fraction} allows: {progress}"


def _failures(run: PreparedRun, whole: Totals) -> list[str]:
    if not whole.num_failed_rows:
        return []
    codes = ", ".join(f"{code} {count}" for code, count in sorted(whole.failures.items()))
    line = f"failed rows: {whole.num_failed_rows} ({100 * whole.failed_fraction:.1f} %): {codes}"
    if _has_too_many_failed(run, whole):
        limit = run.config.limits.max_failed_fraction
        line += f"; more than limits.max_failed_fraction={limit} allows, so _SUCCESS is not written"
    if whole.num_retryable_rows:
        line += f"; {whole.num_retryable_rows} may succeed with --retry-failed"
    return [line, *_failed_examples(run, whole)]


def _cut_texts(run: PreparedRun, whole: Totals) -> list[str]:
    """A warning where texts that had to be something were cut before they were."""
    sampling = run.config.sampling
    constraint = sampling.constraint()
    if constraint is None or not whole.num_cut_samples:
        return []
    limit = f"sampling.max_new_tokens={sampling.max_new_tokens}"
    cut = f"{counted(whole.num_cut_samples, 'text')} cut by {limit}"
    return [f"{cut} before sampling.{constraint.kind} was fulfilled (finish_reason length)"]


def _has_too_many_failed(run: PreparedRun, whole: Totals) -> bool:
    return whole.failed_fraction > run.config.limits.max_failed_fraction


def _failed_examples(run: PreparedRun, whole: Totals) -> Iterator[str]:
    """A row of every error code, with what was said of it."""
    import pyarrow.compute as pc

    from dspark_batch.batch.retry import committed_table

    name, error = shown_columns(run.config, run.plan)[0], run.config.output.name_of("error")
    for code, shard in sorted(whole.failing_shards.items()):
        entry = run.store.entry(shard)
        if entry is None:
            continue
        table = committed_table(entry, run=run.store)
        place = pc.struct_field(table.column(error), "code").to_pylist().index(code)
        yield from format_rows(table.slice(place, 1), columns=[name, error])


def _sample_rows(run: PreparedRun) -> list[str]:
    from dspark_batch.batch.retry import committed_table

    for shard in run.plan.shards:
        entry = run.store.entry(shard.name)
        if entry is not None and entry.stats.num_output_rows:
            table = committed_table(entry, run=run.store).slice(0, NUM_SAMPLE_ROWS)
            return [f"first rows of {entry.file}:", *format_rows(table, columns=_without_empty_error(run, table))]
    return []


def _without_empty_error(run: PreparedRun, table: pa.Table) -> list[str]:
    columns = shown_columns(run.config, run.plan)
    return columns if table.column(columns[-1]).null_count < table.num_rows else columns[:-1]


def _cell(name: str, value: object) -> str:
    from dspark_batch.batch.prompts import UnreadableValue

    if isinstance(value, UnreadableValue):
        return f"{name}=<{value.error.message}>"
    if isinstance(value, Mapping) and value.keys() >= {"code", "message", "retryable"}:
        return f"{name}={_one_line('{code}: {message}'.format_map(value), limit=MAX_ERROR_CHARS)}"
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, Mapping | list) else str(value)
    return f"{name}={_one_line(text, limit=MAX_CELL_CHARS)}"


def _one_line(text: str, *, limit: int) -> str:
    """Line breaks and what a terminal would obey shown as escapes; cut to ``limit`` characters."""
    start = _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text[: limit + 1])
    return start if len(start) <= limit else start[: limit - 1] + "…"
