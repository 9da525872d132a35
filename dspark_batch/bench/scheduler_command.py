"""The options of ``dspark-batch bench scheduler``, and what it prints: progress on stderr, a table, one JSON line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Concurrency,
    Dtype,
    MaxNewTokens,
    Repeats,
    Target,
    Threads,
    engine_config,
    run_module,
    write_json,
)
from dspark_batch.bench.scheduler import Plan, run_scheduler_bench

_QUICK_CONCURRENCIES = (1, 8)
_QUICK_LENGTHS = (1, 3)
_QUICK_NEW_TOKENS = 16
_QUICK_JOB_CONCURRENCY = 4


def command(
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `turns` or `prompt`; default: built in.")
    ] = None,
    concurrency: Concurrency = "1,2,4,8,16,32,64",
    lengths: Annotated[
        str, typer.Option(help="Fixed draft lengths, comma-separated; plain decoding is 0.")
    ] = "1,2,3,5,7",
    repeats: Repeats = 3,
    max_new_tokens: MaxNewTokens = 32,
    target: Target = DEFAULT_TARGET,
    dtype: Dtype = "auto",
    drafter: Annotated[str, typer.Option(help="Of all settings but plain decoding.")] = "auto",
    drafter_path: Annotated[str | None, typer.Option(help="Checkpoint of a dspark or draft_model drafter.")] = None,
    threads: Threads = None,
    job_concurrency: Annotated[int, typer.Option(min=1, help="Rows decoded together in the two jobs.")] = 16,
    job_rows: Annotated[int | None, typer.Option(min=1, help="Default: twice the jobs' concurrency.")] = None,
    no_jobs: Annotated[bool, typer.Option("--no-jobs", help="Leave the whole job and the mixed job out.")] = False,
    warm_up_s: Annotated[float, typer.Option(min=0, help="Seconds in which auto learns each concurrency.")] = 6.0,
    cold: Annotated[
        bool, typer.Option("--cold", help="A new auto policy for every run, not only in the jobs.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A minute that shows whether everything works.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plain decoding, fixed draft lengths and schedule=auto in turns: constant rows, a whole job, a mixed job.

    Up to 8 rows every repeat is six runs of each, of the jobs three.
    """
    values = {"target": target, "dtype": dtype, "drafter": drafter, "drafter_path": drafter_path}
    plan = Plan(
        engine=engine_config({**values, "threads": threads or "auto"}),
        prompts=prompts,
        concurrencies=parse_concurrencies(concurrency),
        lengths=parse_concurrencies(lengths, option="--lengths"),
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        job_concurrency=job_concurrency,
        job_rows=job_rows,
        has_jobs=not no_jobs,
        warm_up_s=warm_up_s,
        cold=cold,
    )
    report = run_scheduler_bench(_quick(plan) if quick else plan, tell=_tell)
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(report.table())
    if as_json:
        write_json(report.as_dict())


def _quick(plan: Plan) -> Plan:
    return replace(
        plan,
        concurrencies=_QUICK_CONCURRENCIES,
        lengths=_QUICK_LENGTHS,
        repeats=1,
        max_new_tokens=_QUICK_NEW_TOKENS,
        warm_up_s=0.0,
        job_concurrency=_QUICK_JOB_CONCURRENCY,
    )


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(run_module(command))
