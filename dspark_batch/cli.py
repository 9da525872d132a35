"""The command line. Heavy modules load inside the commands that need them."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from dspark_batch.errors import ConfigError, DSparkBatchError, FingerprintMismatchError, Problem
from dspark_batch.job.outcome import ExitCode, Outcome

app = typer.Typer(
    name="dspark-batch",
    help="Lossless speculative decoding for offline LLM generation over tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure throughput, acceptance and losslessness.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

PricePerEngineHour = Annotated[float | None, typer.Option(min=0, help="Money for an engine-hour; adds the price.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the job.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as sampling.seed=1.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate, count shards and rows, print the run.")] = False,
    preview: Annotated[
        int | None, typer.Option("--preview", min=1, metavar="N", help="Generate the first N rows; write nothing.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Generate rows again that failed but may succeed.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare checksums of what is committed; make again what differs.")
    ] = False,
) -> None:
    """Run the job of CONFIG; the same command again resumes it."""
    chosen = [
        flag
        for flag, on in (("--dry-run", dry_run), ("--preview", preview is not None), ("--retry-failed", retry_failed))
        if on
    ]
    if len(chosen) > 1:
        raise ConfigError([Problem(" ".join(chosen), "exclude each other; give one of them", "command line")])
    try:
        outcome = _run(
            config, overrides or [], dry_run=dry_run, preview=preview, retry_failed=retry_failed, verify=verify
        )
    except KeyboardInterrupt:
        if dry_run or preview is not None:
            _complain("ended at once; nothing was written")
        else:
            _complain("ended at once; committed shards stay, and the same command goes on from there")
        raise typer.Exit(ExitCode.FATAL) from None
    print(outcome.text)
    raise typer.Exit(outcome.code)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the job.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as sampling.seed=1.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=8, help="Rows of the pilot; default: twice what is decoded together, 48 to 512.")
    ] = None,
    price_per_engine_hour: PricePerEngineHour = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
) -> None:
    """Tokens, time and money that the job of CONFIG would take, from a pilot of random rows; writes nothing."""
    from dspark_batch.job.estimate import estimate_job

    try:
        outcome = estimate_job(
            config,
            overrides=overrides or [],
            num_rows=rows,
            price_per_engine_hour=price_per_engine_hour,
            as_json=as_json,
        )
    except KeyboardInterrupt:
        _complain("ended at once; nothing was written")
        raise typer.Exit(ExitCode.FATAL) from None
    print(outcome.text)


@app.command()
def report(
    output_path: Annotated[str, typer.Argument(metavar="OUTPUT_PATH", help="Folder or URI of a run, done or not.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write the page here.")] = None,
    price_per_engine_hour: PricePerEngineHour = None,
) -> None:
    """What a run did and what it cost so far: rows, tokens, engine-hours, failures."""
    from dspark_batch.report.command import report_command

    report_command(output_path, html=html, price=price_per_engine_hour)


@app.command()
def table(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file of the job; its input and output sections may be missing."),
    ],
    source: Annotated[str, typer.Option(help="Spark table to read.")],
    target: Annotated[str, typer.Option(help="Spark table to write.")],
    staging: Annotated[str, typer.Option(help="Folder or URI that Spark and the job reach.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as sampling.seed=1.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Where the rows are generated: ray or spark.")] = "ray",
    ray_job_address: Annotated[str | None, typer.Option(help="Submit the job to this Ray cluster.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target if it exists.")] = False,
) -> None:
    """Generate for every row of a Spark table (under spark-submit: jobs/generate_spark.py); again to resume."""
    from dspark_batch.job.tables import TableRun, run_spark_table

    run = TableRun(
        config=config,
        overrides=tuple(overrides or ()),
        source=source,
        target=target,
        staging=staging,
        backend=backend,
        ray_job_address=ray_job_address,
        overwrite=overwrite,
    )
    print(run_spark_table(run))


@app.command()
def profile(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file of a job; its model and speculation count.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as model.dtype=float32.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target, instead of that of CONFIG.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Drafter, instead of that of CONFIG.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a figure (needs the report extra).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure even if this device has a table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The table as one JSON object, last line.")] = False,
) -> None:
    """Cost table of this device: what steps and drafts take, as schedule=auto uses it; measured where there is none."""
    from dspark_batch.bench.cost_profile import profile_command

    profile_command(
        config,
        target=target,
        drafter=drafter,
        overrides=overrides or [],
        plot=plot,
        is_fresh=fresh,
        as_json=as_json,
    )


@bench_app.command("throughput")
def bench_throughput(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML: model, speculation, engine, sampling; the rest is ignored.")
    ],
    prompts: Annotated[Path, typer.Option(help="JSON lines with `turns` or `prompt`, or a Parquet file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as speculation.drafter=ngram.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column of a Parquet file.")] = "prompt",
    concurrency: Annotated[str, typer.Option(help="Rows decoded together, comma-separated.")] = "1,8,32,128",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; medians are shown.")] = 5,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows per run; default: twice the concurrency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object, last line.")] = False,
) -> None:
    """Tokens per second of CONFIG over a prompt file, plain and as configured, in turns."""
    from dspark_batch.bench.command import throughput

    throughput(
        config,
        prompts=prompts,
        overrides=overrides or [],
        column=column,
        concurrency=concurrency,
        repeats=repeats,
        num_rows=rows,
        as_json=as_json,
    )


@bench_app.command(
    "lossless", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench_lossless(context: typer.Context) -> None:
    """Token ids of many settings, compared with each other and with transformers; exit code 1 where they differ."""
    from dspark_batch.bench.lossless import command
    from dspark_batch.bench.options import run_module

    raise typer.Exit(run_module(command, context.args))


@bench_app.command(
    "scheduler", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench_scheduler(context: typer.Context) -> None:
    """Plain decoding, fixed draft lengths and schedule=auto in turns: constant rows, a whole job, a mixed job."""
    from dspark_batch.bench.options import run_module
    from dspark_batch.bench.scheduler_command import command

    raise typer.Exit(run_module(command, context.args))


@bench_app.command(
    "calibration", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench_calibration(context: typer.Context) -> None:
    """How well every acceptance estimator foretells what is accepted: ECE, AUC and Brier score by draft position."""
    from dspark_batch.bench.calibration import command
    from dspark_batch.bench.options import run_module

    raise typer.Exit(run_module(command, context.args))


@bench_app.command(
    "simulate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench_simulate(context: typer.Context) -> None:
    """Schedules of an 8B model on an H100 by a simulated clock, from 1 to 1,024 rows."""
    from dspark_batch.bench.options import run_module
    from dspark_batch.bench.simulate import command

    raise typer.Exit(run_module(command, context.args))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML or JSON file of the training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as optimize.seed=1.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", min=0, help="Stop and save after this time; again to go on.")
    ] = None,
    until: Annotated[str, typer.Option(help="Last stage to do: prompts, responses, train or evaluate.")] = "evaluate",
) -> None:
    """Train a DSpark drafter for a target; the same command again resumes it."""
    from dspark_batch.training.run import train as run_training

    raise typer.Exit(run_training(str(config), overrides=overrides or [], max_minutes=max_minutes, until=until))


@app.command()
def version() -> None:
    """Print the version."""
    from dspark_batch import __version__

    print(__version__)


def run_cli(arguments: list[str] | None = None) -> int:
    """Runs one command line (``sys.argv`` by default) and gives its exit code; errors of users go to stderr."""
    try:
        app(args=arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.OK
    except ConfigError as error:
        is_typed = all(problem.source == "command line" for problem in error.problems)
        what = "command line" if is_typed else "config"
        _complain(f"the {what} is not valid:", *(f"  {problem}" for problem in error.problems))
        return ExitCode.BAD_CONFIG
    except FingerprintMismatchError as error:
        _complain(str(error))
        return ExitCode.BAD_CONFIG
    except DSparkBatchError as error:
        _complain(str(error))
        return ExitCode.FATAL
    return ExitCode.OK


def _run(
    config: Path, overrides: list[str], *, dry_run: bool, preview: int | None, retry_failed: bool, verify: bool
) -> Outcome:
    from dspark_batch.job.preview import preview_job
    from dspark_batch.job.runner import dry_run_job, run_job

    if dry_run:
        return dry_run_job(config, overrides=overrides)
    if preview is not None:
        return preview_job(config, overrides=overrides, num_rows=preview)
    return run_job(config, overrides=overrides, retry_failed=retry_failed, verify=verify)


def main() -> None:
    """Entry point of the console script."""
    code = run_cli()
    if any(thread.name.startswith("dspark-batch") for thread in threading.enumerate()):
        # Given up in native code, as where a model loads: it would abort the process as the interpreter ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(*lines: str) -> None:
    for number, line in enumerate(lines):
        print(f"dspark-batch: {line}" if number == 0 else line, file=sys.stderr)


if __name__ == "__main__":
    main()
