"""The page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from dspark_batch.report.charts import Chart, position_chart, time_chart
from dspark_batch.report.figures import Cost, Series, acceptance, run_totals, series_of, utc

if TYPE_CHECKING:
    from dspark_batch.batch.work import EngineWork
    from dspark_batch.job.outcome import Totals
    from dspark_batch.report.records import RunRecords

TEMPLATE = Path(__file__).with_name("page.html.j2")
MAX_LISTED = 40
"""Engines and starts in their tables, the newest of them."""

_KEYS_IN_URI = re.compile(r"://[^/@\s]*@")
SHOWN_SETTINGS = (
    "task",
    "model.target",
    "speculation.drafter",
    "speculation.schedule",
    "speculation.verification",
    "engine.backend",
    "input.path",
    "input.filter",
    "input.limit",
    "output.column",
    "output.format",
)
"""Not all of them: properties of catalogs may hold secrets."""
ENDINGS = {
    "done": "all its shards committed",
    "signal": "stopped by a signal",
    "grace_over": "stopped by a signal, running shards given up",
    "token_budget": "stopped at limits.max_generated_tokens",
    "time_budget": "stopped at limits.max_run_s",
    "too_many_failed": "stopped, too many rows failed",
}


def draw_page(run: RunRecords, *, price: float | None = None) -> str:
    """The HTML text. ``price``: of an engine-hour."""
    totals = run_totals(run)
    cost = Cost.of(run.engines, num_rows=totals.num_rows, num_tokens=totals.num_generated_tokens, price=price)
    series = series_of(run.engines)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        path=_without_secrets(run.path),
        state=state_of(run),
        is_finished=run.is_finished,
        drawn_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        tiles=_tiles(run, totals, cost),
        period=_period(series),
        charts=_charts(run, series),
        costs=cost_rows(totals, cost),
        failures=_failures(totals),
        starts=_starts(run.starts[-MAX_LISTED:]),
        num_starts=len(run.starts),
        engines=[_engine(engine) for engine in run.engines[-MAX_LISTED:]],
        num_engines=len(run.engines),
        settings=_settings(run),
    )
    return text.encode("utf-8", errors="replace").decode()


def state_of(run: RunRecords) -> str:
    """Whether the run is done, in a few words."""
    if run.is_finished:
        return "finished"
    shards = f"{len(run.entries):,} {'shard' if len(run.entries) == 1 else 'shards'}"
    where = ", beside the output that it is to replace" if run.is_overwriting else ""
    if run.num_open_shards:
        return f"not finished: {shards} committed, {run.num_open_shards:,} to do{where}"
    limit = (run.config.get("limits") or {}).get("max_failed_fraction")
    if limit is not None and run_totals(run).failed_fraction > limit:
        allowed = f"more than limits.max_failed_fraction={limit} allows"
        return f"not done, too many rows failed ({allowed}); {shards} committed, none to do{where}"
    return f"not finished: {shards} committed, and the output is not marked as done{where}"


def cost_rows(totals: Totals, cost: Cost) -> list[tuple[str, str, str, str]]:
    """(what, amount, per million rows, per million generated tokens), what is known."""
    amounts: list[tuple[str, float]] = []
    if cost.num_engines:
        amounts.append(("engine-hours", cost.engine_hours))
        if cost.price is not None:
            amounts.append((f"price at {cost.price:,.10g} an hour", cost.price * cost.engine_hours))
    amounts += [("prompt tokens", totals.num_prompt_tokens), ("generated tokens", totals.num_generated_tokens)]
    return [
        (name, number(amount), number(cost.per_million_rows(amount)), number(cost.per_million_tokens(amount)))
        for name, amount in amounts
    ]


def number(value: float | None) -> str:
    """Whole from a hundred on, else three digits that count."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:.3g}"


def speed(cost: Cost, engines: Sequence[EngineWork]) -> float | None:
    """Generated tokens per second of an engine, once it was loaded; None where no engine says."""
    work_s = cost.engine_s - cost.load_s
    return sum(engine.total.num_generated_tokens for engine in engines) / work_s if work_s > 0 else None


def _tiles(run: RunRecords, totals: Totals, cost: Cost) -> list[tuple[str, str, str]]:
    """(name, value, what to know of it)."""
    about_rows = f"{totals.num_failed_rows:,} failed ({100 * totals.failed_fraction:.1f} %)"
    if num_copied := sum(entry.stats.num_copied_rows for entry in run.entries):
        about_rows += f"; {num_copied:,} took the result of an equal prompt"
    tiles = [
        ("rows", f"{totals.num_rows:,}", about_rows),
        ("generated tokens", f"{totals.num_generated_tokens:,}", f"{totals.num_prompt_tokens:,} prompt tokens"),
    ]
    if cost.num_engines:
        loading = f"{number(cost.load_s / 3600)} of them loading; {_counted(cost.num_engines, 'engine')}"
        tiles.append(("engine-hours", number(cost.engine_hours), loading))
        tiles.append(("tokens per second", number(speed(cost, run.engines)), "of an engine, once it is loaded"))
    if totals.accepted_length is not None:
        tiles.append(("accepted length", f"{totals.accepted_length:.2f}", _drafted(totals)))
    return tiles


def _drafted(totals: Totals) -> str:
    if not totals.num_drafted_tokens:
        return "tokens per row and round; nothing was drafted"
    share = 100 * totals.num_accepted_tokens / totals.num_drafted_tokens
    return f"tokens per row and round; {share:.0f} % of drafted tokens accepted"


def _period(series: Series | None) -> str:
    if series is None:
        return ""
    begin, end = utc(series.spans[0].begin_s), utc(series.spans[-1].end_s)
    pauses = len(series.spans) - 1
    cut = f"; {_counted(pauses, 'pause')} without an engine cut out of the time axis (dashed lines)" if pauses else ""
    return f"{begin} to {end} UTC{cut}"


def _charts(run: RunRecords, series: Series | None) -> list[Chart]:
    if series is None:
        return []
    cuts = list(series.cuts())

    def chart(title: str, lines: Mapping[str, Sequence[float | None]], about: str) -> Chart:
        return time_chart(title, lines, about=about, total_s=series.total_s, cuts=cuts)

    charts = [chart("Throughput", {"tokens": series.tokens_per_s}, "generated tokens per second, all engines")]
    if max(series.num_engines) > 1.05:
        charts.append(chart("Engines", {"engines": list(series.num_engines)}, "engines that ran, loading included"))
    charts.append(chart("Batch size", {"samples": series.batch_size}, "samples per step of an engine, mean"))
    if any(series.num_verified_tokens):
        lines = {"verified": series.draft_length, "accepted": series.accepted_per_round}
        charts.append(chart("Draft length", lines, "drafted tokens per sample and round, mean"))
    if positions := acceptance(run.engines):
        about = "accepted share of the tokens that were verified at each position of a draft, in %"
        charts.append(position_chart("Acceptance by draft position", positions, about=about))
    return charts


def _failures(totals: Totals) -> list[tuple[str, str, str]]:
    """(code, rows, share of all rows), the most frequent first."""
    ordered = sorted(totals.failures.items(), key=lambda failure: (-failure[1], failure[0]))
    return [(code, f"{count:,}", f"{100 * count / totals.num_rows:.2f} %") for code, count in ordered]


def _starts(starts: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for start in starts:
        done, elapsed_s = start["done"], float(start["elapsed_s"])
        tokens = int(done["num_generated_tokens"])
        rows.append(
            (
                str(start["finished_at"])[:16].replace("T", " "),
                ENDINGS.get(start["ending"], str(start["ending"])),
                str(start["backend"]),
                _duration(elapsed_s),
                f"{done['num_rows']:,}",
                f"{tokens:,}",
                number(tokens / elapsed_s if elapsed_s else None),
            )
        )
    return rows


def _engine(engine: EngineWork) -> tuple[str, ...]:
    total, work_s = engine.total, engine.engine_s - engine.load_s
    return (
        utc(engine.begin_s),
        f"{engine.host}/{engine.pid}",
        " ".join(filter(None, (engine.device, engine.hardware))),
        _duration(engine.engine_s),
        _duration(engine.load_s),
        f"{total.num_samples:,}",
        f"{total.num_generated_tokens:,}",
        number(total.num_generated_tokens / work_s if work_s > 0 else None),
        number(total.num_rounds / total.num_steps if total.num_steps else None),
    )


def _settings(run: RunRecords) -> list[tuple[str, str]]:
    found = [(name, _setting(run.config, name)) for name in SHOWN_SETTINGS]
    shown = [(name, _without_secrets(str(value))) for name, value in found if value is not None]
    return [*shown, ("fingerprint", run.fingerprint)]


def _without_secrets(text: str) -> str:
    """Keys in URIs (``s3://key:secret@bucket``) left out: a page is passed around."""
    return _KEYS_IN_URI.sub("://***@", text)


def _setting(config: Mapping[str, Any], name: str) -> object:
    found: object = config
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _duration(seconds: float) -> str:
    from dspark_batch.job.progress import format_duration

    return format_duration(seconds)


def _counted(count: int, noun: str) -> str:
    from dspark_batch.job.progress import counted

    return counted(count, noun)
