"""Whole runs on a real Ray (loopback) through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.job.outcome import ExitCode
from dspark_batch.testing.jobs import Job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

FACTORIES = "dspark_batch.testing.engine_factories"
ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ray_job(job: Job, ray_loopback: None) -> Job:
    job.config["engine"]["backend"] = "ray"
    return job


def rows_by_shard(job: Job) -> dict[str, bytes]:
    return {name: data for name, (_, data) in job.parts().items()}


def test_two_actors_one_actor_and_no_ray_write_the_same_bytes(ray_job: Job, capsys: Capture) -> None:
    assert run_cli(["run", ray_job.write(), "ray.actors=2", "ray.shards_in_flight=3"]) == ExitCode.OK
    assert "done: 47 rows in 8 shards" in capsys.readouterr().out
    two = rows_by_shard(ray_job)
    assert len(two) == 8
    for number, override in enumerate(["ray.actors=1", "engine.backend=local"]):
        other = ray_job.folder / f"other{number}"
        assert run_cli(["run", ray_job.write(), f"output.path={other}", override]) == ExitCode.OK
        assert {file.name: file.read_bytes() for file in other.glob("*.parquet")} == two


def test_deleting_one_output_file_makes_exactly_that_shard_again(ray_job: Job, capsys: Capture) -> None:
    assert run_cli(["run", ray_job.write()]) == ExitCode.OK
    before = ray_job.parts()
    lost = sorted(before)[5]
    (ray_job.out / lost).unlink()
    assert run_cli(["run", ray_job.write()]) == ExitCode.OK
    after = ray_job.parts()
    assert {name for name in after if after[name][0] != before[name][0]} <= {lost}
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert ray_job.metrics()[-1]["done"]["num_shards"] == 1
    assert (ray_job.out / "_SUCCESS").exists()
    assert run_cli(["run", ray_job.write()]) == ExitCode.OK
    assert "nothing to do" in capsys.readouterr().out


def test_a_model_that_does_not_load_ends_the_job_with_its_own_words(
    ray_job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, f"{FACTORIES}:missing")
    assert run_cli(["run", ray_job.write(), "model.target=gone"]) == ExitCode.FATAL
    assert "model 'gone': no such checkpoint" in capsys.readouterr().err
    assert not ray_job.parts()


def test_an_engine_that_breaks_is_replaced_and_its_shards_are_retried(
    ray_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, f"{FACTORIES}:breaking")
    assert run_cli(["run", ray_job.write()]) == ExitCode.OK
    assert sorted(read_output(str(ray_job.out)).column("id").to_pylist()) == sorted(f"r{n}" for n in range(47))


def test_an_engine_that_always_breaks_ends_the_job_with_its_fault(
    ray_job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, f"{FACTORIES}:broken")
    assert run_cli(["run", ray_job.write()]) == ExitCode.FATAL
    err = capsys.readouterr().err
    assert "the engine broke over 3 rows, each by itself" in err
    assert "scripted fault after 0 samples" in err


def test_actors_that_do_not_fit_are_refused(ray_job: Job, capsys: Capture) -> None:
    assert run_cli(["run", ray_job.write(), "ray.num_cpus=1000"]) == ExitCode.BAD_CONFIG
    assert "do not fit" in capsys.readouterr().err


def test_a_token_budget_stops_the_actors_too(ray_job: Job) -> None:
    ray_job.config["ray"] = {"shards_in_flight": 1}
    assert run_cli(["run", ray_job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    assert len(ray_job.parts()) >= 1
    assert run_cli(["run", ray_job.write()]) == ExitCode.OK


def test_the_transform_works_in_a_pipeline_of_someone_else(ray_loopback: None) -> None:
    import ray.data
    from ray.data import ActorPoolStrategy

    from dspark_batch.ray_data import Generate

    config = {
        "input": {"id": "key"},
        "prompt": {"template": "Say {{ text }}"},
        "output": {"column": "answer"},
        "sampling": {"temperature": 0.9},
    }
    table = pa.table({"key": [f"k{n}" for n in range(31)], "text": [f"t{n}" for n in range(31)]})
    out = ray.data.from_arrow(table).map_batches(
        Generate,
        batch_size=7,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        fn_constructor_kwargs={"config": config, "engine_factory": f"{FACTORIES}:scripted"},
    )
    rows = {row["key"]: row["answer"] for row in out.take_all()}
    whole = Generate(config, engine_factory=f"{FACTORIES}:scripted")(table)
    assert rows == dict(zip(whole["key"].to_pylist(), whole["answer"].to_pylist(), strict=True))


def run_in_process(job: Job, *overrides: str) -> subprocess.CompletedProcess[str]:
    """As from a shell; through the entry point for ``ray job submit``."""
    environment = {**os.environ, "RAY_ADDRESS": ""}
    command = [sys.executable, str(ROOT / "jobs" / "generate.py"), job.write(), "engine.backend=ray", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.slow
def test_actors_that_still_load_when_the_time_is_over_begin_no_shard(job: Job) -> None:
    done = run_in_process(job, "limits.max_run_s=0.001")
    assert done.returncode == ExitCode.FATAL, done.stderr
    assert "stopped at limits.max_run_s=0.001: 0 of 47 rows are committed; the same command goes on" in done.stdout
    assert not job.parts()


def test_a_run_starts_its_own_ray_on_the_loopback_and_stops_it(job: Job) -> None:
    done = run_in_process(job)
    assert done.returncode == ExitCode.OK, done.stderr
    assert "RAY_" not in done.stderr, "what Ray says of itself is kept from the terminal"
    assert "done: 47 rows in 8 shards" in done.stdout
    assert read_output(str(job.out)).num_rows == 47
