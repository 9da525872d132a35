"""Schedules compared without a model: ``dspark-batch bench simulate``.

Real schedules (plain, fixed lengths, auto) decode made-up jobs against a roofline of an 8B model on an H100, or the
cost table of a real device, and an acceptance model or a recorded trace, from 1 to 1,024 concurrent rows, with short
and long prompts. The clock is simulated: figures compare schedules, they are no throughput. On a noisy machine that is
the only way to see differences of a percent. How devices are counted: ``dspark_batch.scheduling.simulator.device``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import AsJson, names, run_module, write_json
from dspark_batch.errors import ConfigError, InputError, Problem

if TYPE_CHECKING:
    from rich.table import Table

    from dspark_batch.scheduling.cost_table import CostTable
    from dspark_batch.scheduling.simulator.acceptance import AcceptanceModel
    from dspark_batch.scheduling.simulator.device import Device
    from dspark_batch.scheduling.simulator.scenario import Scenario, ScenarioResult
    from dspark_batch.scheduling.traces import RecordedRound

CONTEXTS = {"brief": (100, 32), "short": (128, 128), "long": (8192, 512)}
"""Prompt tokens, and mean output tokens."""

CHANCES = "0.82,0.80,0.78,0.76,0.74,0.72,0.70"
"""Conditional chances of a seven-token block; about 3.4 tokens a round, as the published 8B drafters have."""

SCHEDULES = "plain,fixed-1,fixed-3,fixed-5,fixed-7,auto"
_LIMIT_FACTOR = 2


def scenarios(
    contexts: Sequence[str],
    concurrencies: Sequence[int],
    *,
    num_rows: int | None = None,
    ends_at_limits: bool = False,
) -> list[Scenario]:
    """One job for each; outputs may grow to twice their mean, which is what a row reserves.

    Raises:
        ConfigError: an unknown kind of context.
    """
    from dspark_batch.scheduling.simulator.scenario import Scenario

    if unknown := set(contexts) - set(CONTEXTS):
        raise ConfigError([Problem("--context", f"must be of {', '.join(CONTEXTS)}, got {sorted(unknown)}")])
    return [
        Scenario(
            name=context,
            prompt_len=CONTEXTS[context][0],
            mean_output_len=CONTEXTS[context][1],
            max_new_tokens=_LIMIT_FACTOR * CONTEXTS[context][1],
            concurrency=concurrency,
            num_rows=num_rows,
            ends_at_limits=ends_at_limits,
        )
        for context in contexts
        for concurrency in concurrencies
    ]


def acceptance_of(
    rounds: Sequence[RecordedRound] | None, *, chances: Sequence[float], seed: int, first_row: int = 0
) -> Callable[[], AcceptanceModel]:
    """A maker of fresh models: of a recorded trace from ``first_row`` on where there is one, else parametric.

    Raises:
        InputError: the trace cannot be replayed.
    """
    from dspark_batch.scheduling.simulator.acceptance import ParametricAcceptance, TraceAcceptance

    if rounds is None:
        return lambda: ParametricAcceptance(chances, seed=seed)
    return lambda: TraceAcceptance(rounds, first_row=first_row)


def read_costs(path: Path) -> CostTable:
    """The table out of what ``dspark-batch profile --json`` printed.

    Raises:
        InputError: there is no such file, or no table in its last line.
    """
    from dspark_batch.scheduling.cost_table import CostTable

    if not path.is_file():
        raise InputError(f"{path}: no such file; `dspark-batch profile --target NAME --json > {path}` makes one")
    try:
        last = path.read_text(encoding="utf-8").strip().splitlines()[-1]
        return CostTable.from_dict(json.loads(last)["table"])
    except (OSError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: the last line is no cost table of `dspark-batch profile --json`: {error!r}"
        ) from None


def as_dict(result: ScenarioResult) -> dict[str, Any]:
    """One scenario's figures: tokens/s by schedule, auto's ratios where it ran, and what each schedule did."""
    scenario = result.scenario
    out: dict[str, Any] = {
        "context": scenario.name,
        "concurrency": scenario.concurrency,
        "prompt_len": scenario.prompt_len,
        "mean_output_len": scenario.mean_output_len,
        "tokens_per_s": {name: run.tokens_per_s for name, run in result.runs.items()},
        "best_fixed": result.best_fixed,
    }
    for name, run in result.runs.items():
        out.setdefault("runs", {})[name] = {
            "wall_s": run.wall_s,
            "tail_s": run.tail_s,
            "mean_rows": run.mean_rows,
            "accepted_length": run.stats.accepted_length,
            "num_drafted_tokens": run.stats.num_drafted_tokens,
            "num_verified_draft_tokens": run.stats.num_verified_draft_tokens,
            "draft_share": run.stats.draft_s / run.wall_s,
            "planning_ms_per_step": 1e3 * run.planning_s / run.stats.num_steps,
            "planning_share": run.planning_s / run.wall_s,
        }
    if "auto" in result.runs:
        out["auto_to_best_fixed"] = result.ratio("auto", to=result.best_fixed)
        if "plain" in result.runs:
            out["auto_to_plain"] = result.ratio("auto", to="plain")
    return out


def _table(found: Sequence[dict[str, Any]], schedules: Sequence[str]) -> Table:
    """Simulated tokens per second for a terminal."""
    from rich.table import Table

    out = Table("context", "rows", "decoded together", *schedules, "auto / best fixed", "plan ms", title="tokens/s")
    for row in found:
        last = row["runs"][schedules[-1]]
        ratio = row.get("auto_to_best_fixed")
        out.add_row(
            row["context"],
            str(row["concurrency"]),
            f"{last['mean_rows']:.0f}",
            *(f"{row['tokens_per_s'][name]:.0f}" for name in schedules),
            "" if ratio is None else f"{ratio:.3f} ({row['best_fixed']})",
            f"{last['planning_ms_per_step']:.2f}",
        )
    return out


def command(
    rows: Annotated[str, typer.Option(help="Concurrent rows, comma-separated.")] = "1,4,16,64,256,1024",
    context: Annotated[str, typer.Option(help="Kinds of rows, comma-separated: brief, short, long.")] = "short,long",
    schedules: Annotated[str, typer.Option(help="plain, auto, threshold, fixed-K, comma-separated.")] = SCHEDULES,
    chances: Annotated[str, typer.Option(help="Chance of each draft position, given the earlier ones held.")] = CHANCES,
    trace: Annotated[Path | None, typer.Option(help="Recorded rounds to replay instead of --chances.")] = None,
    costs: Annotated[
        Path | None, typer.Option(help="What `dspark-batch profile --json` printed: that device, not an H100.")
    ] = None,
    noise: Annotated[float, typer.Option(min=0.0, help="Of the times of --costs, relative.")] = 0.0,
    job_rows: Annotated[int | None, typer.Option(min=1, help="Default: three times what is decoded together.")] = None,
    known_lengths: Annotated[bool, typer.Option("--known-lengths", help="Rows end at their limits.")] = False,
    count_planning: Annotated[
        bool, typer.Option("--count-planning", help="The schedule's own real time is part of the clock.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Jobs with other rows; their times are added up.")] = 1,
    seed: Annotated[int, typer.Option(help="Of row lengths, acceptance and noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Schedules by a simulated clock, from 1 to 1,024 rows: of an 8B model on an H100, or of a profiled device."""
    from rich.console import Console

    from dspark_batch.scheduling.simulator.device import ProfiledDevice, RooflineDevice
    from dspark_batch.scheduling.simulator.scenario import is_fixed, run_scenario
    from dspark_batch.scheduling.traces import read_trace

    chosen, of_positions = names(schedules), _numbers(chances)
    rounds = read_trace(trace) if trace is not None else None
    table = read_costs(costs) if costs is not None else None
    if noise and table is None:
        raise ConfigError([Problem("--noise", "is of the times of --costs; the H100 has none")])
    if not any(map(is_fixed, chosen)):
        raise ConfigError([Problem("--schedules", f"needs plain or a fixed length to compare with, got {schedules!r}")])
    concurrencies = parse_concurrencies(rows, option="--rows")
    found = []
    for scenario in scenarios(names(context), concurrencies, num_rows=job_rows, ends_at_limits=known_lengths):
        started = time.perf_counter()
        results = []
        first_row = 0
        for repeat in range(seed, seed + repeats):

            def device(seed: int = repeat) -> Device:
                return RooflineDevice() if table is None else ProfiledDevice(table, noise=noise, seed=seed)

            results.append(
                run_scenario(
                    scenario,
                    chosen,
                    device=device,
                    acceptance=acceptance_of(rounds, chances=of_positions, seed=repeat, first_row=first_row),
                    seed=repeat,
                    counts_planning=count_planning,
                )
            )
            first_row += len(scenario.rows(device()))
        found.append(as_dict(sum(results[1:], results[0])))
        took_s = time.perf_counter() - started
        sys.stderr.write(f"{scenario.name}, {scenario.concurrency} rows: {took_s:.1f} s\n")
    Console(width=None if sys.stdout.isatty() else 200).print(_table(found, chosen))
    if as_json:
        write_json({"scenarios": found})


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < chance < 1 for chance in found):
        raise ConfigError([Problem("--chances", f"must be numbers between 0 and 1 such as 0.8,0.7, got {text!r}")])
    return found


if __name__ == "__main__":
    sys.exit(run_module(command))
