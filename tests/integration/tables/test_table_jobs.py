"""The command line over what spans several starts: overwrite, leases, nightly runs, checks, tables."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.batch.lease import acquire_lease
from dspark_batch.batch.store import Store
from dspark_batch.cli import run_cli
from dspark_batch.job.outcome import ExitCode
from dspark_batch.testing.engine_factories import STEP_DELAY_VARIABLE
from dspark_batch.testing.jobs import SCRIPTED, Job, reviews, write_job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    made = write_job(tmp_path, reviews(47))
    made.config["input"]["path"] = str(tmp_path / "*.parquet")
    return made


def stars(job: Job) -> list[int]:
    return sorted(read_output(str(job.out))["stars"].to_pylist())


def test_an_overwrite_that_breaks_leaves_the_old_output_and_goes_on(job):
    assert run_cli(["run", job.write()]) == ExitCode.OK
    before = read_output(str(job.out))
    changed = ["run", job.write(), "sampling.seed=5", "output.mode=overwrite"]
    assert run_cli([*changed, "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    assert read_output(str(job.out)).equals(before)
    assert (job.out / "_SUCCESS").exists()
    assert run_cli(changed) == ExitCode.OK
    assert job.metrics()[-1]["done"]["num_shards"] < 8
    after = read_output(str(job.out))
    assert after["stars"].to_pylist() == before["stars"].to_pylist()
    assert after["answer"] != before["answer"]


def test_an_overwrite_that_broke_begins_anew_once_its_input_has_changed(job):
    assert run_cli(["run", job.write()]) == ExitCode.OK
    changed = ["run", job.write(), "sampling.seed=5", "output.mode=overwrite"]
    assert run_cli([*changed, "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    pq.write_table(reviews(53).slice(47), job.folder / "later.parquet")
    assert run_cli(changed) == ExitCode.OK
    assert stars(job) == list(range(53))


@pytest.mark.parametrize("incremental", [None, "rows"])
def test_an_overwrite_whose_plan_cannot_be_read_begins_anew(job, incremental):
    job.config["input"]["incremental"] = incremental
    changed = ["run", job.write(), "output.mode=overwrite"]
    assert run_cli([*changed, "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    (job.out / "_dspark" / "next" / "plan.json").write_text("{")
    assert run_cli(changed) == ExitCode.OK
    assert job.metrics()[-1]["done"]["num_shards"] == 8
    assert stars(job) == list(range(47))


def test_an_overwrite_over_its_limits_does_not_replace_anything(job):
    assert run_cli(["run", job.write()]) == ExitCode.OK
    before = read_output(str(job.out))
    job.config["prompt"]["template"] = "{{ 8 // stars }}"
    bad = ["run", job.write(), "output.mode=overwrite", "limits.max_failed_fraction=0"]
    assert run_cli(bad) == ExitCode.TOO_MANY_FAILED
    assert read_output(str(job.out)).equals(before)


def test_nightly_starts_do_new_files_and_count_only_them(job, capsys):
    job.config["input"]["incremental"] = "files"
    assert run_cli(["run", job.write()]) == ExitCode.OK
    pq.write_table(reviews(53).slice(47), job.folder / "later.parquet")
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=60"]) == ExitCode.OK
    assert "done: 6 rows in 1 shard" in capsys.readouterr().out
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert stars(job) == list(range(53))


@pytest.mark.parametrize("incremental", ["files", "rows"])
def test_failed_rows_of_a_file_that_has_changed_are_not_tried_again_on_other_rows(
    job, monkeypatch, capsys, incremental
):
    job.config["input"]["incremental"] = incremental
    monkeypatch.setenv("DSPARK_BATCH_TEST_FAILURES", "Say text 3=engine_error")
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    monkeypatch.delenv("DSPARK_BATCH_TEST_FAILURES")
    before = job.parts()
    pq.write_table(reviews(48).slice(1), job.folder / "in.parquet", row_group_size=13)
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.FATAL
    assert "in.parquet is not the file that this run planned" in capsys.readouterr().err
    assert job.parts() == before


def test_verify_makes_again_what_was_changed_without_a_trace(job):
    import os

    assert run_cli(["run", job.write()]) == ExitCode.OK
    path = sorted(job.out.glob("*.parquet"))[2]
    stat, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert path.read_bytes() != data
    assert run_cli(["run", job.write(), "--verify"]) == ExitCode.OK
    assert path.read_bytes()[-4:] == b"PAR1"
    assert stars(job) == list(range(47))


def test_a_second_run_of_a_live_output_fails_and_says_who_holds_it(job, capsys, monkeypatch):
    monkeypatch.setattr("dspark_batch.batch.lease.HEARTBEAT_S", 0.1)
    with acquire_lease(Store(str(job.out)), run_id="other", on_conflict="fail", heartbeat_s=0.1):
        assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert "run other" in capsys.readouterr().err
    assert run_cli(["run", job.write()]) == ExitCode.OK


@pytest.mark.parametrize("on_conflict", ["fail", "wait", "take_over"])
def test_two_processes_at_once_end_with_every_row_once(job, on_conflict, monkeypatch):
    monkeypatch.setenv(STEP_DELAY_VARIABLE, "0.05")
    command = [sys.executable, "-m", "dspark_batch.cli", "run", job.write(), f"output.on_conflict={on_conflict}"]
    results: list[int] = []

    def start() -> None:
        results.append(subprocess.run(command, check=False, capture_output=True, timeout=120).returncode)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ExitCode.OK in results
    if on_conflict == "wait":
        assert results == [ExitCode.OK, ExitCode.OK]
    assert stars(job) == list(range(47))
    assert (job.out / "_SUCCESS").exists()


def test_a_delta_table_is_written_from_the_command_line_and_failed_rows_are_replaced(job, monkeypatch):
    deltalake = pytest.importorskip("deltalake")
    job.config["output"]["format"] = "delta"
    monkeypatch.setenv("DSPARK_BATCH_TEST_FAILURES", "Say text 3=engine_error")
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    assert deltalake.DeltaTable(job.out).version() == 1
    monkeypatch.delenv("DSPARK_BATCH_TEST_FAILURES")
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.OK
    table = deltalake.DeltaTable(job.out)
    rows = [row for uri in table.file_uris() for row in pq.read_table(uri).to_pylist()]
    assert sorted(row["stars"] for row in rows) == list(range(47))
    assert all(row["error"] is None for row in rows)
    assert yaml.safe_load((job.out / "_dspark" / "run.yaml").read_text())["output"]["format"] == "delta"
