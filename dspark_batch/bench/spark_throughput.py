"""Throughput through Spark on one executor, against the local backend on the same rows.

``python -m dspark_batch.bench.spark_throughput --rows 1000 --repeats 3 --output result.json``. Loading the model is not
timed on either side; reading the rows, generating them and writing Parquet is. The texts of both sides are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dspark_batch.provenance import device_facts, versions

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

TOPICS = ("a kettle", "running shoes", "a desk lamp", "headphones", "a backpack", "a frying pan", "a phone case")
COMPLAINTS = ("arrived late", "broke after a week", "is louder than expected", "is lovely", "does what it should")
TEMPLATE = "Write one sentence in answer to this review: {{ body }}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured. ``target`` is a model's name or path; ``num_threads`` None means every core."""

    num_rows: int
    num_repeats: int
    max_new_tokens: int
    target: str
    num_threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One pass over the rows. ``texts`` by row id."""

    elapsed_s: float
    num_tokens: int
    texts: dict[int, str | None]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s


def benchmark_rows(num_rows: int) -> pa.Table:
    """Distinct short reviews, the same every time."""
    import pyarrow as pa

    bodies = [
        f"Order {row}: I bought {TOPICS[row % len(TOPICS)]} and it {COMPLAINTS[row % len(COMPLAINTS)]}."
        for row in range(num_rows)
    ]
    return pa.table({"id": pa.array(range(num_rows), pa.int64()), "body": bodies})


def job_values(setup: Setup, *, folder: Path) -> dict[str, Any]:
    """The sections that both sides share; threads are fixed, so that both engines get the same."""
    return {
        "model": {"target": setup.target},
        "input": {"path": str(folder / "rows.parquet"), "id": "id"},
        "prompt": {"template": TEMPLATE},
        "sampling": {"max_new_tokens": setup.max_new_tokens, "ignore_eos": True},
        "engine": {"backend": "local", "threads": setup.num_threads or len(os.sched_getaffinity(0))},
        "spark": {"engine_process": "sidecar"},
        "shards": {"rows": 128},
    }


def measure_local(setup: Setup, *, folder: Path, name: str) -> Sample:
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
    with ShardExecutor(spec) as executor:
        in_flight = run.config.shards_in_flight(num_shards=len(run.plan.shards))
        backend = LocalBackend(executor.run, live=executor.live, shards_in_flight=in_flight)
        start_s = time.perf_counter()
        for _ in backend.run(run.plan.shards):
            pass
        elapsed_s = time.perf_counter() - start_s
    return _sample(read_output(values["output"]["path"]).to_pylist(), elapsed_s=elapsed_s)


def measure_spark(spark: SparkSession, setup: Setup, *, folder: Path, name: str) -> Sample:
    """One pass of ``generate`` with a sidecar that is loaded already, written as Parquet to ``folder / name``."""
    from dspark_batch.spark import generate

    rows = spark.read.parquet(str(folder / "rows.parquet"))
    config = job_values(setup, folder=folder)
    warm = {**config, "sampling": {**config["sampling"], "max_new_tokens": 1}}
    generate(rows.limit(1), warm, id="id", column="text").collect()
    out = str(folder / name)
    start_s = time.perf_counter()
    generate(rows, config, id="id", column="text", num_partitions=2).write.parquet(out)
    elapsed_s = time.perf_counter() - start_s
    return _sample([row.asDict() for row in spark.read.parquet(out).collect()], elapsed_s=elapsed_s)


def compare(spark: SparkSession, setup: Setup, *, folder: Path) -> dict[str, Any]:
    """Alternating passes of both sides; medians, their ratio, and whether all texts are equal. Plain JSON values."""
    import pyarrow.parquet as pq

    pq.write_table(benchmark_rows(setup.num_rows), folder / "rows.parquet")
    local, through_spark = [], []
    for repeat in range(setup.num_repeats):
        local.append(measure_local(setup, folder=folder, name=f"local{repeat}"))
        through_spark.append(measure_spark(spark, setup, folder=folder, name=f"spark{repeat}"))
    medians = [statistics.median(sample.tokens_per_s for sample in side) for side in (local, through_spark)]
    return {
        "setup": asdict(setup),
        "local_tokens_per_s": [sample.tokens_per_s for sample in local],
        "spark_tokens_per_s": [sample.tokens_per_s for sample in through_spark],
        "spark_over_local": medians[1] / medians[0],
        "texts_equal": all(sample.texts == local[0].texts for sample in (*local, *through_spark)),
        "device": asdict(device_facts()),
        "versions": versions(),
    }


def main(arguments: Sequence[str]) -> int:
    """The command line; writes JSON to ``--output`` and a line to the standard output."""
    parser = argparse.ArgumentParser(description="Throughput through Spark against the local backend")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    setup = Setup(
        num_rows=given.rows,
        num_repeats=given.repeats,
        max_new_tokens=given.max_new_tokens,
        target=given.target,
        num_threads=given.threads,
    )
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    try:
        with TemporaryDirectory(prefix="dspark-batch-bench-") as folder:
            result = compare(spark, setup, folder=Path(folder))
    finally:
        spark.stop()
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"spark/local {result['spark_over_local']:.3f}, texts equal: {result['texts_equal']}\n")
    return 0


def _sample(rows: Sequence[dict[str, Any]], *, elapsed_s: float) -> Sample:
    return Sample(
        elapsed_s=elapsed_s,
        num_tokens=sum(row["num_generated_tokens"] for row in rows),
        texts={row["id"]: row["text"] for row in rows},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
