from __future__ import annotations

import json

import pytest

from dspark_batch.bench import spark_throughput
from dspark_batch.bench.options import run_module
from dspark_batch.bench.spark_throughput import NUM_WARM_UP_ROWS, Setup, compare, format_result
from dspark_batch.bench.table_rows import benchmark_rows

pytestmark = pytest.mark.spark


def test_the_throughput_benchmark_compares_equal_work_on_all_sides(spark, engine, tmp_path) -> None:
    folder = tmp_path / "bench"
    folder.mkdir()
    setup = Setup(num_rows=37, num_repeats=1, max_new_tokens=4, target=str(engine.path), num_threads=1)
    result = compare(spark, setup, folder=folder)
    assert result["texts_equal"]
    assert set(result["tokens_per_s"]) == {"local", "sidecar", "worker"}
    assert {len(rates) for rates in result["tokens_per_s"].values()} == {1}
    assert set(result["over_local"]) == {"sidecar", "worker"}
    assert len(engine.rows()) == 3 * (37 + NUM_WARM_UP_ROWS)
    assert {load["threads"] for load in engine.loads()} == {1}
    assert len(format_result(json.loads(json.dumps(result))).splitlines()) == 4


def test_the_benchmarks_rows_are_distinct_and_stable() -> None:
    rows = benchmark_rows(100)
    assert len(set(rows["body"].to_pylist())) == 100
    assert rows.equals(benchmark_rows(100))


def test_an_engine_process_that_spark_does_not_have_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module(spark_throughput.command, ["--processes", "sidecar,thread"]) == 2
    assert "--processes: has thread; known are sidecar, worker" in capsys.readouterr().err
