"""``_dspark/report.html``: the page of a run, drawn when it ends, and what it cost in a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspark_batch.job.prepare import PreparedRun
from dspark_batch.job.progress import counted

if TYPE_CHECKING:
    from dspark_batch.batch.work import EngineWork
    from dspark_batch.report.records import RunRecords

REPORT_FILE = "report.html"


def write_report(run: PreparedRun) -> tuple[list[str], float | None]:
    """Draw the run as far as it has come. A run does not fail for its page: raises nothing.

    Returns lines for the run's summary, and when the first engine of this start was loaded, as UNIX time.
    """
    try:
        from dspark_batch.report.page import draw_page
        from dspark_batch.report.records import read_run

        meta = run.store.ticket.meta
        records = read_run(run.config.output.path, meta=meta)
        run.store.write_meta(REPORT_FILE, draw_page(records))
        mine = [engine for engine in records.engines if engine.run_id == run.store.run_id]
        lines = [*_cost(records, mine), f"report: {run.config.output.path}/{meta}/{REPORT_FILE}"]
        return lines, min((engine.begin_s + engine.load_s for engine in mine), default=None)
    except Exception as error:
        return [f"warning: there is no report of this run: {type(error).__name__}: {error}"], None


def _cost(records: RunRecords, mine: Sequence[EngineWork]) -> list[str]:
    """A line on the engine time of this start and of the whole run; none where no engine told."""
    from dspark_batch.report.figures import Cost, run_totals
    from dspark_batch.report.page import number

    totals = run_totals(records)
    here, whole = (
        Cost.of(engines, num_rows=totals.num_rows, num_tokens=totals.num_generated_tokens)
        for engines in (mine, records.engines)
    )
    if not mine:
        return []
    line = f"cost: {number(here.engine_hours)} engine-hours of {counted(here.num_engines, 'engine')}"
    if whole.num_engines > here.num_engines:
        line += f", {number(whole.engine_hours)} with the starts before"
    return [f"{line}; {number(whole.per_million_rows(whole.engine_hours))} per million rows"]
