from __future__ import annotations

from dspark_batch.batch.commit import read_output
from dspark_batch.bench.pipeline import measure_pipeline


def test_the_benchmark_runs_a_whole_job_and_counts_its_rows(tmp_path):
    figures = measure_pipeline(2500, folder=tmp_path, rows_per_shard=512)
    assert (figures.num_rows, figures.num_shards) == (2500, 5)
    assert figures.rows_per_s > 0
    assert figures.peak_mib >= figures.half_mib >= figures.start_mib > 0
    assert read_output(str(tmp_path / "out")).num_rows == 2500
    assert (tmp_path / "out" / "_SUCCESS").exists()
