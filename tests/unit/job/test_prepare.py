"""Checks before a run, and what is left of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.errors import ConfigError, FingerprintMismatchError, InputError, OutputError
from dspark_batch.job.prepare import prepare, remaining
from dspark_batch.job.runner import run_job
from dspark_batch.job.summary import describe
from dspark_batch.testing.jobs import SCRIPTED, Job, reviews, write_job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    return write_job(tmp_path, reviews(23))


def test_the_fingerprint_covers_what_decides_the_output_and_nothing_else(job: Job) -> None:
    first = prepare(job.write()).fingerprint
    same = ["speculation.drafter=none", "engine.backend=ray", "shards.rows=3", "ray.actors=2", "output.path=elsewhere"]
    same += ["limits.max_run_s=60"]
    other = ["sampling.seed=1", "prompt.template=x{{ text }}", "output.column=b", "input.id=text", "model.target=m"]
    assert {prepare(job.write(), overrides=[override]).fingerprint for override in same} == {first}
    assert len({prepare(job.write(), overrides=[override]).fingerprint for override in other} | {first}) == 6


def test_preparing_writes_nothing_and_finds_everything_left_to_do(job: Job) -> None:
    run = prepare(job.write())
    left = remaining(run)
    assert left.shards == run.plan.shards
    assert left.totals.num_rows == 0
    assert not job.out.exists()
    assert "23 rows in 4 shards" in describe(run, left).text


def test_a_finished_run_has_nothing_left_unless_it_is_overwritten(job: Job) -> None:
    run_job(job.write())
    assert remaining(prepare(job.write())).shards == ()
    assert remaining(prepare(job.write())).totals.num_rows == 23
    assert len(remaining(prepare(job.write(), overrides=["output.mode=overwrite"])).shards) == 4


def test_a_run_over_the_first_rows_is_a_run_of_its_own_that_resumes(job: Job) -> None:
    job.config["input"]["limit"] = 10
    run = prepare(job.write())
    assert "10 rows in 1 file, 2 shards" in describe(run, remaining(run)).text
    assert run_job(job.write()).is_success
    assert remaining(prepare(job.write())).totals.num_rows == 10
    with pytest.raises(FingerprintMismatchError, match=r"input\.limit: 10 there, 20 here"):
        prepare(job.write(), overrides=["input.limit=20"])


def test_retry_failed_goes_on_with_a_run_that_was_configured_to_overwrite(job: Job) -> None:
    run_job(job.write())
    run = prepare(job.write(), overrides=["output.mode=overwrite"], retry_failed=True)
    assert run.config.output.mode == "resume"
    assert remaining(run, retry_failed=True).shards == ()


def test_a_mismatch_names_settings_even_when_the_input_changed_too(job: Job, tmp_path: Path) -> None:
    run_job(job.write())
    (tmp_path / "more").mkdir()
    write_job(tmp_path / "more", reviews(3))
    with pytest.raises(FingerprintMismatchError, match=r"input\.path"):
        prepare(job.write(), overrides=[f"input.path={tmp_path}/more/in.parquet"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("prompt.template=x{{ text", r"prompt\.template: does not parse"),
        ("prompt.template=x{{ txt }}", r"prompt\.template: the input has no column 'txt'"),
        ("input.filter=star > 1", r"input\.filter: .*'star'"),
        ("input.path=nowhere.parquet", r"nowhere\.parquet"),
    ],
)
@pytest.mark.parametrize("mode", ["resume", "error"])
def test_a_mistake_comes_before_what_the_output_holds(job: Job, wrong: str, message: str, mode: str) -> None:
    run_job(job.write())
    with pytest.raises((ConfigError, InputError), match=message):
        prepare(job.write(), overrides=[wrong, f"output.mode={mode}"])


def test_an_output_path_that_is_a_file_or_below_one_is_refused(job: Job) -> None:
    (job.folder / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output\.path: '.*/file' is a file"):
        prepare(job.write(), overrides=[f"output.path={job.folder}/file"])
    with pytest.raises(ConfigError, match=r"output\.path: '.*/file/a/b' cannot be made: '.*/file' is a file"):
        prepare(job.write(), overrides=[f"output.path={job.folder}/file/a/b"])


@pytest.mark.parametrize("out", ["locked", "locked/new"])
def test_an_output_path_that_is_not_writable_is_refused(job: Job, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = job.folder / "locked"
    locked.mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and may(path, mode))
    with pytest.raises(ConfigError, match=r"output\.path: .*the folder '.*/locked' is not writable"):
        prepare(job.write(), overrides=[f"output.path={job.folder / out}"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can make another")
def test_an_output_folder_that_cannot_be_made_is_named(job: Job) -> None:
    with pytest.raises((ConfigError, OutputError), match=r"output\.path: .*/proc/x/y"):
        run_job(job.write(), overrides=["output.path=/proc/x/y"])


def test_a_relative_output_inside_the_copy_of_a_ray_job_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="temporary copy"):
        prepare(job.write(), overrides=["output.path=out"])
    prepare(job.write())


def test_a_ray_backend_without_ray_is_refused_with_what_to_install(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark_batch.job.prepare.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dspark-batch\[ray\]'"):
        prepare(job.write(), overrides=["engine.backend=ray"])
