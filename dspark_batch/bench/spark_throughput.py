"""Throughput through Spark on one executor, against the local backend on the same rows.

``python -m dspark_batch.bench.spark_throughput --rows 1000 --repeats 5``. All sides take turns. On each, some other
rows go the same way first, so that neither the start of the JVM and of Python workers nor the model's loading is
timed; reading the rows, generating them and writing Parquet is. The texts of all sides are compared. There is no
drafter by default: those that learn from the job would meet rows again that an engine of Spark, which stays, has seen.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    MaxNewTokens,
    Repeats,
    Rows,
    Target,
    Threads,
    names,
    run_module,
    write_json,
)
from dspark_batch.bench.table_rows import TEMPLATE, benchmark_rows
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.provenance import device_facts, versions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOCAL = "local"
NUM_TASKS = {"sidecar": 2, "worker": 1}
"""Tasks by where Spark's engine lives: two share one sidecar; an engine of a Python worker has one. One engine each."""

NUM_SLOTS = 2
NUM_WARM_UP_ROWS = 8
WARM_UP_FILE, TIMED_FILE = "0-warm-up.parquet", "1-timed.parquet"
KV_CACHE_GIB = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured. processes: of ``NUM_TASKS``. target: a model's name or path."""

    num_rows: int
    num_repeats: int
    max_new_tokens: int
    target: str
    num_threads: int
    processes: tuple[str, ...] = tuple(NUM_TASKS)
    drafter: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over the rows. ``texts`` by row id."""

    elapsed_s: float
    num_tokens: int
    texts: dict[int, str | None]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s


def write_rows(setup: Setup, *, folder: Path) -> None:
    """The table of both sides: the rows to warm up with (ids below 0) in one file, those that are timed in another."""
    import pyarrow.parquet as pq

    (folder / "rows").mkdir()
    pq.write_table(benchmark_rows(NUM_WARM_UP_ROWS, first=-NUM_WARM_UP_ROWS), folder / "rows" / WARM_UP_FILE)
    pq.write_table(benchmark_rows(setup.num_rows), folder / "rows" / TIMED_FILE)


def job_values(setup: Setup, *, folder: Path, process: str = "auto") -> dict[str, Any]:
    """The sections that all sides share; threads and memory are fixed, so that all engines get the same."""
    return {
        "model": {"target": setup.target},
        "speculation": {"drafter": setup.drafter},
        "input": {"path": str(folder / "rows"), "id": "id"},
        "prompt": {"template": TEMPLATE},
        "sampling": {"max_new_tokens": setup.max_new_tokens, "ignore_eos": True},
        "engine": {"backend": LOCAL, "threads": setup.num_threads, "kv_cache_gib": KV_CACHE_GIB},
        "spark": {"engine_process": process},
        "shards": {"rows": 128},
    }


def measure_local(setup: Setup, *, folder: Path, name: str) -> Pass:
    """One pass of the local backend: the shards of a job, committed to ``folder / name``."""
    from dspark_batch.batch.commit import read_output
    from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
    from dspark_batch.job.loader import config_from_values, dump_config
    from dspark_batch.job.local import LocalBackend
    from dspark_batch.job.prepare import prepare

    values = {**job_values(setup, folder=folder), "output": {"path": str(folder / name), "column": "text"}}
    config = folder / f"{name}.yaml"
    config.write_text(dump_config(config_from_values(values, source="benchmark")), encoding="utf-8")
    run = prepare(config)
    run.store.open(run.fields)
    spec = WorkerSpec(
        config=run.config,
        plan_schema=run.plan.schema,
        fingerprint=run.fingerprint,
        run_id=run.store.run_id,
        engine_factory=run.engine_factory,
        ticket=run.store.ticket,
    )
    shards = run.plan.shards
    warm_up = [shard for shard in shards if shard.relative == WARM_UP_FILE]
    timed = [shard for shard in shards if shard.relative == TIMED_FILE]
    assert len(warm_up) + len(timed) == len(shards), [shard.relative for shard in shards]
    with ShardExecutor(spec) as executor:
        in_flight = run.config.shards_in_flight(num_shards=len(timed))
        backend = LocalBackend(executor.run, live=executor.live, shards_in_flight=in_flight)
        for _ in backend.run(warm_up):
            pass
        start_s = time.perf_counter()
        for _ in backend.run(timed):
            pass
        elapsed_s = time.perf_counter() - start_s
    rows = read_output(values["output"]["path"]).to_pylist()
    return _pass([row for row in rows if row["id"] >= 0], elapsed_s=elapsed_s)


def measure_spark(spark: SparkSession, setup: Setup, *, process: str, folder: Path, name: str) -> Pass:
    """One pass of ``generate``, written as Parquet to ``folder / name``."""
    from dspark_batch.spark import generate

    config = job_values(setup, folder=folder, process=process)

    def run(file: str, out: Path, *, num_tasks: int) -> float:
        start_s = time.perf_counter()
        rows = spark.read.parquet(str(folder / "rows" / file))
        generate(rows, config, id="id", column="text", num_partitions=num_tasks).write.parquet(str(out))
        return time.perf_counter() - start_s

    # In every task slot: Spark gives the next task to any of the Python workers that are idle.
    run(WARM_UP_FILE, folder / f"{name}-warm-up", num_tasks=NUM_SLOTS)
    elapsed_s = run(TIMED_FILE, folder / name, num_tasks=NUM_TASKS[process])
    return _pass([row.asDict() for row in spark.read.parquet(str(folder / name)).collect()], elapsed_s=elapsed_s)


def compare(spark: SparkSession, setup: Setup, *, folder: Path) -> dict[str, Any]:
    """Passes of all sides in turns, each repeat beginning with another; rates, and ratios to the local backend.

    Ratios are medians of the per-repeat ratios. Plain JSON values.
    """
    write_rows(setup, folder=folder)
    sides = (LOCAL, *setup.processes)
    passes: dict[str, list[Pass]] = {side: [] for side in sides}
    for repeat in range(setup.num_repeats):
        first = repeat % len(sides)
        for side in (*sides[first:], *sides[:first]):
            name = f"{side}{repeat}"
            if side == LOCAL:
                passes[side].append(measure_local(setup, folder=folder, name=name))
            else:
                passes[side].append(measure_spark(spark, setup, process=side, folder=folder, name=name))
    reference = passes[LOCAL]
    return {
        "setup": asdict(setup),
        "tokens_per_s": {side: [one.tokens_per_s for one in found] for side, found in passes.items()},
        "over_local": {side: _ratio(passes[side], reference) for side in setup.processes},
        "texts_equal": all(one.texts == reference[0].texts for found in passes.values() for one in found),
        "device": asdict(device_facts()),
        "versions": versions(),
    }


def format_result(result: dict[str, Any]) -> str:
    """One line a side."""
    lines = []
    for side, rates in result["tokens_per_s"].items():
        ratio = result["over_local"].get(side)
        against = "" if ratio is None else f"  {ratio:.3f} of the local backend"
        lines.append(f"{side:<8} {statistics.median(rates):8.0f} tokens/s{against}")
    return "\n".join([*lines, f"texts equal: {result['texts_equal']}"])


def command(
    rows: Rows = 1000,
    repeats: Repeats = 5,
    max_new_tokens: MaxNewTokens = 32,
    target: Target = DEFAULT_TARGET,
    threads: Threads = None,
    processes: Annotated[
        str, typer.Option(help="Where Spark's engine lives, comma-separated, of: " + ", ".join(NUM_TASKS))
    ] = ",".join(NUM_TASKS),
    drafter: Annotated[str, typer.Option(help="The same on all sides.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Throughput through Spark on one executor, and the local backend's on the same rows, in turns."""
    unknown = set(names(processes)) - set(NUM_TASKS)
    if unknown:
        message = f"has {', '.join(sorted(unknown))}; known are {', '.join(NUM_TASKS)}"
        raise ConfigError([Problem("--processes", message, "command line")])
    setup = Setup(
        num_rows=rows,
        num_repeats=repeats,
        max_new_tokens=max_new_tokens,
        target=target,
        num_threads=threads or len(os.sched_getaffinity(0)),
        processes=names(processes),
        drafter=drafter,
    )
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{NUM_SLOTS}]").config("spark.driver.host", "127.0.0.1")
    builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
    spark = builder.getOrCreate()
    try:
        with TemporaryDirectory(prefix="dspark-batch-bench-") as folder:
            result = compare(spark, setup, folder=Path(folder))
    finally:
        spark.stop()
    sys.stdout.write(format_result(result) + "\n")
    if as_json:
        write_json(result)


def _ratio(found: Sequence[Pass], reference: Sequence[Pass]) -> float:
    return statistics.median(one.tokens_per_s / other.tokens_per_s for one, other in zip(found, reference, strict=True))


def _pass(rows: Sequence[dict[str, Any]], *, elapsed_s: float) -> Pass:
    return Pass(
        elapsed_s=elapsed_s,
        num_tokens=sum(row["num_generated_tokens"] for row in rows),
        texts={row["id"]: row["text"] for row in rows},
    )


if __name__ == "__main__":
    sys.exit(run_module(command))
