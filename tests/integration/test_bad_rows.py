"""Rows that break the engine, in whole runs: each fails alone, whether the engine raises or its process dies."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.job.outcome import ExitCode
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.jobs import Job

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def engine(job: Job, monkeypatch: pytest.MonkeyPatch) -> EngineFolder:
    """The job's engine, whose options decide what it breaks on. The job has two shards, of 40 rows at most."""
    folder = EngineFolder.make(job.folder / "engine")
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, FACTORY)
    job.config |= {"model": {"target": str(folder.path)}, "shards": {"rows": 40}}
    job.config["limits"] = {"max_failed_fraction": 0.2}
    return folder


def errors_of(job: Job) -> dict[str, Any]:
    return {row["id"]: row["error"] for row in read_output(str(job.out)).to_pylist() if row["error"] is not None}


@pytest.mark.parametrize(
    ("backend", "how", "fault"),
    [
        ("local", "raise", "scripted fault over r5"),
        pytest.param("ray", "raise", "scripted fault over r5", marks=(pytest.mark.ray, pytest.mark.slow)),
        pytest.param("ray", "exit", "the process ended without a word", marks=pytest.mark.ray),
    ],
)
def test_a_row_that_breaks_the_engine_fails_alone_and_can_be_tried_again(
    job: Job, engine: EngineFolder, backend: str, how: str, fault: str, request: pytest.FixtureRequest
) -> None:
    if backend == "ray":
        request.getfixturevalue("ray_loopback")
    job.config["engine"]["backend"] = backend
    EngineFolder.make(engine.path, break_on={"Say text 5": how, "Say text 45": how})
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    errors = errors_of(job)
    assert {row: (error["code"], error["retryable"]) for row, error in errors.items()} == {
        "r5": ("engine_error", True),
        "r45": ("engine_error", True),
    }
    assert fault in errors["r5"]["message"]
    EngineFolder.make(engine.path)
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.OK
    clean = job.folder / "clean"
    assert run_cli(["run", job.write(), f"output.path={clean}", "engine.backend=local"]) == ExitCode.OK
    assert read_output(str(job.out)).equals(read_output(str(clean)))


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=(pytest.mark.ray, pytest.mark.slow))])
def test_an_engine_that_breaks_over_every_row_ends_the_run_with_its_fault(
    job: Job, engine: EngineFolder, backend: str, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    if backend == "ray":
        request.getfixturevalue("ray_loopback")
    job.config["engine"]["backend"] = backend
    EngineFolder.make(engine.path, break_on={f"Say text {n}": "raise" for n in range(47)})
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    err = capsys.readouterr().err
    assert "the engine broke over 3 rows, each by itself" in err
    assert "warning: the engine broke and is loaded again: scripted fault over r" in err
    assert len(engine.loads()) < 12
    assert not job.parts()
    assert not (job.out / "_SUCCESS").exists()
