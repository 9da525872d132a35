"""Schedules of an 8B model on an H100, compared without either: ``dspark-batch bench simulate``.

Real schedules (plain, fixed lengths, auto) decode made-up jobs against a roofline of the device and an acceptance model
or a recorded trace, from 1 to 1,024 concurrent rows, with short and long prompts. The clock is simulated: figures
compare schedules, they are no throughput. How the device is counted: ``dspark_batch.scheduling.simulator.device``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import AsJson, names, run_module, write_json
from dspark_batch.errors import ConfigError, Problem

if TYPE_CHECKING:
    from rich.table import Table

    from dspark_batch.scheduling.simulator.acceptance import AcceptanceModel
    from dspark_batch.scheduling.simulator.scenario import Scenario, ScenarioResult

CONTEXTS = {"short": (128, 128), "long": (8192, 512)}
"""Prompt tokens, and mean output tokens."""

CHANCES = "0.82,0.80,0.78,0.76,0.74,0.72,0.70"
"""Conditional chances of a seven-token block; about 3.4 tokens a round, as the published 8B drafters have."""

SCHEDULES = "plain,fixed-1,fixed-3,fixed-5,fixed-7,auto"
_LIMIT_FACTOR = 2


def scenarios(contexts: Sequence[str], concurrencies: Sequence[int]) -> list[Scenario]:
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
        )
        for context in contexts
        for concurrency in concurrencies
    ]


def acceptance_of(trace: Path | None, *, chances: Sequence[float], seed: int) -> Callable[[], AcceptanceModel]:
    """A maker of fresh models: of the recorded trace where there is one, else parametric.

    Raises:
        InputError: the trace cannot be read or replayed.
    """
    from dspark_batch.scheduling.simulator.acceptance import ParametricAcceptance, TraceAcceptance
    from dspark_batch.scheduling.traces import read_trace

    if trace is None:
        return lambda: ParametricAcceptance(chances, seed=seed)
    rounds = read_trace(trace)
    return lambda: TraceAcceptance(rounds)


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


def table(found: Sequence[dict[str, Any]], schedules: Sequence[str]) -> Table:
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
    context: Annotated[str, typer.Option(help="Kinds of rows, comma-separated: short, long.")] = "short,long",
    schedules: Annotated[str, typer.Option(help="plain, auto, threshold, fixed-K, comma-separated.")] = SCHEDULES,
    chances: Annotated[str, typer.Option(help="Chance of each draft position, given the earlier ones held.")] = CHANCES,
    trace: Annotated[Path | None, typer.Option(help="Recorded rounds to replay instead of --chances.")] = None,
    seed: Annotated[int, typer.Option(help="Of row lengths and acceptance.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Schedules of an 8B model on an H100 by a simulated clock, from 1 to 1,024 rows."""
    from rich.console import Console

    from dspark_batch.scheduling.simulator.device import RooflineDevice
    from dspark_batch.scheduling.simulator.scenario import run_scenario

    acceptance = acceptance_of(trace, chances=_numbers(chances), seed=seed)
    chosen = names(schedules)
    found = []
    for scenario in scenarios(names(context), parse_concurrencies(rows, option="--rows")):
        started = time.perf_counter()
        result = run_scenario(scenario, chosen, device=RooflineDevice(), acceptance=acceptance, seed=seed)
        found.append(as_dict(result))
        took_s = time.perf_counter() - started
        sys.stderr.write(f"{scenario.name}, {scenario.concurrency} rows: {took_s:.1f} s\n")
    Console(width=None if sys.stdout.isatty() else 200).print(table(found, chosen))
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
