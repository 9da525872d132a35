"""The table-job benchmark on a tiny random model, with the local backend."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.bench.table_job import Setup, compare, format_result
from dspark_batch.testing.tiny import save_tiny_checkpoint


def test_the_job_and_the_bare_engine_do_equal_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE, raising=False)
    model = save_tiny_checkpoint(tmp_path / "tiny", max_position_embeddings=512)
    folder = tmp_path / "bench"
    folder.mkdir()
    setup = Setup(
        num_rows=23, num_repeats=2, max_new_tokens=6, target=str(model), drafter="none", backend="local", shard_rows=7
    )
    result = json.loads(json.dumps(compare(setup, folder=folder)))
    assert result["texts_equal"]
    assert len(result["slowdowns"]) == len(result["job_whole_s"]) == 2
    assert all(job_s > 0 for job_s in result["job_tokens_per_s"])
    for outside_s, elapsed_s in zip(result["job_outside_s"], result["job_elapsed_s"], strict=True):
        assert 0 < outside_s < elapsed_s
    assert len(format_result(result).splitlines()) == 5
    assert ENGINE_FACTORY_VARIABLE not in os.environ
