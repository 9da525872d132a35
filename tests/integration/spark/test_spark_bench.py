from __future__ import annotations

import json

import pytest

from dspark_batch.bench.spark_throughput import Setup, benchmark_rows, compare

pytestmark = pytest.mark.spark


def test_the_throughput_benchmark_compares_equal_work_on_both_sides(spark, engine, tmp_path) -> None:
    folder = tmp_path / "bench"
    folder.mkdir()
    setup = Setup(num_rows=37, num_repeats=1, max_new_tokens=4, target=str(engine.path), num_threads=1)
    result = compare(spark, setup, folder=folder)
    assert result["texts_equal"]
    assert len(result["local_tokens_per_s"]) == len(result["spark_tokens_per_s"]) == 1
    assert len(engine.rows()) == 2 * 37 + 1
    json.dumps(result)


def test_the_benchmarks_rows_are_distinct_and_stable() -> None:
    rows = benchmark_rows(100)
    assert len(set(rows["body"].to_pylist())) == 100
    assert rows.equals(benchmark_rows(100))
