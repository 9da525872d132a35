"""``dspark-batch report``: the main figures of a run as a table, and its page as a file."""

from __future__ import annotations

from pathlib import Path

from dspark_batch.errors import ConfigError, OutputError, Problem
from dspark_batch.provenance import atomic_write_text
from dspark_batch.report.figures import Cost, acceptance, run_totals
from dspark_batch.report.page import cost_rows, draw_page, number, speed, state_of
from dspark_batch.report.records import RunRecords, read_run


def report_command(output_path: str, *, html: Path | None, price: float | None) -> None:
    """Print the figures of the run in ``output_path``; write its page to ``html``.

    Raises ConfigError where the folder holds no run, or ``html`` is a folder or below a file; OutputError where the run
    cannot be read or the page not be written.
    """
    if html is not None:
        _check_page(html)
    run = read_run(output_path)
    _print(run, price=price)
    if html is None:
        return
    try:
        atomic_write_text(html, draw_page(run, price=price))
    except OSError as error:
        raise OutputError(f"--html: {html} cannot be written: {error.strerror or error}") from error
    print(f"page: {html}")


def _check_page(html: Path) -> None:
    """Raise ConfigError where no file can be at this path."""
    if html.is_dir():
        message = f"{str(html)!r} is a folder; name a file, such as {str(html / 'report.html')!r}"
    elif (above := next(folder for folder in html.absolute().parents if folder.exists())).is_dir():
        return
    else:
        message = f"{str(html)!r} cannot be made, as {str(above)!r} is a file; choose another path"
    raise ConfigError([Problem("--html", message, "command line")])


def _print(run: RunRecords, *, price: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    totals = run_totals(run)
    cost = Cost.of(run.engines, num_rows=totals.num_rows, num_tokens=totals.num_generated_tokens, price=price)
    table = Table()
    for name in ("", "this run", "per million rows", "per million tokens"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("rows", f"{totals.num_rows:,}", "", "")
    table.add_row("failed rows", f"{totals.num_failed_rows:,}", "", "")
    for row in cost_rows(totals, cost):
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(f"{run.path}: {state_of(run)}", soft_wrap=True)
    console.print(table)
    if cost.num_engines:
        console.print(
            f"engines: {cost.num_engines}; tokens per second of an engine, once it is loaded: "
            f"{number(speed(cost, run.engines))}",
            soft_wrap=True,
        )
    else:
        console.print("engine-hours and price: not known, no engine of this run has noted what it did")
    if totals.accepted_length is not None:
        console.print(f"accepted length: {totals.accepted_length:.2f}")
    shares = [f"{100 * accepted / verified:.0f}" for verified, accepted in acceptance(run.engines) if verified]
    if shares:
        console.print(f"accepted by draft position, in %: {' '.join(shares)}", soft_wrap=True)
    for code, count in sorted(totals.failures.items()):
        console.print(f"failed: {code} {count:,}")
