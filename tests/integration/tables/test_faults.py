"""What goes wrong around a run: it is said clearly, tried again where that helps, and nothing is lost or half done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.store import Store
from dspark_batch.errors import InputError, OutputError, TransientStorageError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.faulty_store import FaultyStore
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.scripted_engine import ScriptedEngine

NUM_ROWS = 100


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    (tmp_path / "in").mkdir()
    for part in range(10):
        numbers = list(range(10 * part, 10 * part + 10))
        table = pa.table({"n": numbers, "text": [f"t{n}" for n in numbers]})
        pq.write_table(table, tmp_path / "in" / f"{part}.parquet")
    return JobConfig.model_validate(
        {
            "input": {"path": str(tmp_path / "in")},
            "prompt": {"template": "Say {{ text }}"},
            "output": {"path": str(tmp_path / "out")},
            "shards": {"rows": 10},
        }
    )


def finishes(config: JobConfig, **rest: object) -> None:
    """The same command again, without the fault: every row is there once and nothing is left lying about."""
    start_run(config, **rest)
    assert sorted(read_output(config.output.path)["n"].to_pylist()) == list(range(NUM_ROWS))
    output = RunStore(config.output.path).join("")
    output.sweep(min_age_s=0)
    output.check_integrity()


def committed(config: JobConfig) -> int:
    return len(RunStore(config.output.path).join("").committed())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("fail_at", [11, 12, 13, 14])
def test_a_disk_that_is_full_or_forbidden_while_staging_or_renaming_ends_the_run_clearly(config, code, fail_at):
    store = FaultyStore(config.output.path, fail_at=fail_at, error=OSError(code, "fault"), num_failures=99)
    with pytest.raises(OutputError, match=r"cannot write .*(part-|manifest).*fault"):
        start_run(config, store=store)
    assert not list((Path(config.output.path) / "_dspark" / "staging").iterdir())
    kept = committed(config)
    assert 0 < kept < 10
    engine = ScriptedEngine()
    finishes(config, engine=engine)
    assert engine.counters.num_requests == NUM_ROWS - 10 * kept


def test_time_outs_of_the_store_are_waited_out(config):
    store = FaultyStore(config.output.path, fail_at=8, error=TimeoutError("store is slow"), num_failures=3)
    finishes(config, store=store)


def test_time_outs_that_do_not_end_are_named_and_the_run_can_go_on(config):
    store = FaultyStore(config.output.path, fail_at=8, error=TimeoutError("store is slow"), num_failures=99)
    with pytest.raises(TransientStorageError, match="after 4 tries: store is slow"):
        start_run(config, store=store)
    finishes(config)


def test_a_read_error_in_mid_file_names_the_file_and_keeps_what_was_committed(config, tmp_path):
    path = tmp_path / "in" / "5.parquet"
    good, stat = path.read_bytes(), path.stat()
    assert start_run_breaking(config, path).startswith(f"{path}: cannot be read")
    kept = committed(config)
    assert kept > 0
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    finishes(config)


def start_run_breaking(config: JobConfig, path: Path) -> str:
    """Break the file's pages once the plan is made, with the size and time that the plan noted."""

    class Breaking(Store):
        def _move(self, source: str, target: str) -> None:
            super()._move(source, target)
            if target.endswith("plan.json"):
                stat, data = path.stat(), bytearray(path.read_bytes())
                data[4:120] = b"\xff" * 116
                path.write_bytes(data)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(InputError) as caught:
        start_run(config, store=Breaking(config.output.path))
    return str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_named(config, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match=f"cannot write {folder}.*Permission denied"):
        start_run(config)
    folder.chmod(0o700)
    finishes(config)


def test_an_output_path_below_a_file_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    below = config.model_copy(update={"output": config.output.model_copy(update={"path": f"{tmp_path}/file/out"})})
    with pytest.raises(OutputError, match=r"cannot .*file/out.*Not a directory"):
        start_run(below)
