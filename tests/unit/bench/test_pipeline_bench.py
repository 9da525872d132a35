from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.bench.pipeline import main, measure_pipeline


def test_the_benchmark_stops_a_whole_job_halfway_and_resumes_it(tmp_path: Path) -> None:
    figures = measure_pipeline(2500, folder=tmp_path, rows_per_shard=256, num_processes=2)
    assert (figures.num_rows, figures.num_shards, figures.num_shards_again) == (2500, 10, 0)
    assert figures.rows_per_s > 0
    assert figures.cpu_us_per_row > 0
    assert all(len(half) >= 2 and min(half) > 0 for half in figures.worker_mib)
    assert sorted(read_output(str(tmp_path / "out"))["stars"].to_pylist()) == list(range(2500))
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_the_command_writes_json_and_leaves_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", "600", "--rows-per-shard", "100", "--processes", "1", "--folder", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_rows"] == 600
    assert list(tmp_path.iterdir()) == []
