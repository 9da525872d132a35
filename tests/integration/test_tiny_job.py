"""Whole runs of a real engine on a tiny checkpoint: what scripted engines cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.job.outcome import ExitCode
from dspark_batch.testing.jobs import Job, write_job
from dspark_batch.testing.tiny import save_tiny_checkpoint

CONTEXT = 64
TEXTS = ["abc", "d" * 40, "e" * 100]
"""A prompt that runs, one that needs more than ``LITTLE_MEMORY``, one over the context; a token is a byte."""
LITTLE_MEMORY = "engine.kv_cache_gib=0.00001"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE, raising=False)
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "cache"))
    job = write_job(tmp_path, pa.table({"id": ["fits", "large", "never"], "text": TEXTS}))
    job.config |= {
        "model": {"target": str(save_tiny_checkpoint(tmp_path / "model"))},
        "speculation": {"drafter": "none", "schedule": "off"},
        "prompt": {"template": "{{ text }}", "chat": "never"},
        "sampling": {"max_new_tokens": 4, "ignore_eos": True},
        "engine": {"backend": "local", "device": "cpu", "max_context": CONTEXT, "kv_cache_gib": 0.001},
        "limits": {"max_failed_fraction": 1.0},
    }
    return job


def errors_of(job: Job) -> dict[str, Any]:
    rows = read_output(str(job.out)).to_pylist()
    return {row["id"]: row["error"] for row in rows if row["error"] is not None}


def test_more_memory_mends_a_row_that_had_too_little_and_nothing_mends_one_over_the_context(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["run", job.write(), LITTLE_MEMORY]) == ExitCode.SOME_ROWS_FAILED
    errors = errors_of(job)
    assert {row: (error["code"], error["retryable"]) for row, error in errors.items()} == {
        "large": ("prompt_too_long", True),
        "never": ("prompt_too_long", False),
    }
    assert "engine.kv_cache_gib" in errors["large"]["message"]
    assert "1 may succeed with --retry-failed" in capsys.readouterr().out
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"never": errors["never"]}
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.SOME_ROWS_FAILED
    assert "nothing to do" in capsys.readouterr().out
