from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from pyarrow import fs

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import make_plan
from dspark_batch.batch.store import Store, is_transient
from dspark_batch.errors import OutputError
from dspark_batch.job.config import InputSection


@pytest.fixture(params=["local", "other"])
def store(request, tmp_path) -> Store:
    """On the local disk with fsync, and through a pyarrow filesystem of another kind."""
    if request.param == "local":
        return Store(str(tmp_path / "out"))
    return Store("out", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


def test_files_are_written_replaced_listed_and_deleted(store):
    assert store.files() == {}
    assert store.read("a/b.json") is None
    store.write("a/b.json", b"one", staging="s/1.tmp")
    store.write("a/b.json", b"three", staging="s/2.tmp")
    store.write("top", b"", staging="s/3.tmp")
    assert store.read("a/b.json") == b"three"
    assert {name: file.size_bytes for name, file in store.files(recursive=True).items()} == {"a/b.json": 5, "top": 0}
    assert list(store.files()) == ["top"]
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.read("a/b.json") is None


def test_a_run_works_on_any_pyarrow_filesystem(tmp_path, make_config):
    inner = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    plan = make_plan(InputSection(path="in/*.jsonl"), max_rows=1, filesystem=inner)
    config = make_config(input={"path": "in/*.jsonl"})
    reader = ShardReader(config, plan_schema=plan.schema, filesystem=inner)
    assert [reader.read(shard).ids for shard in plan.shards] == [("a.jsonl#0",), ("a.jsonl#1",)]
    run = RunStore("out", filesystem=inner)
    run.open({"a": 1}, mode="resume")
    assert (tmp_path / "out" / "_dspark" / "fingerprint.json").exists()
    assert run.committed() == {}


def test_a_uri_without_a_filesystem_is_refused():
    with pytest.raises(OutputError, match="nosuch://x"):
        Store("nosuch://x")


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(104, "reset"), True),
        (OSError(110, "Connection timed out"), True),
        (OSError("AWS Error NETWORK_CONNECTION during PutObject"), True),
        (OSError("HTTP 503 Service Unavailable"), True),
        (OSError(28, "No space left on device"), False),
        (PermissionError(13, "Permission denied: /data/timeout"), False),
    ],
)
def test_only_faults_that_usually_pass_are_transient(error, transient):
    assert is_transient(error) is transient


def test_a_folder_that_cannot_be_locked_is_an_output_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot lock .*/file/out/lock: .*Not a directory"), held(tmp_path / "file"):
        pass

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dspark_batch.batch.store.fcntl.flock", no_locks)
    with pytest.raises(OutputError, match=r"cannot lock .*/out/lock: .*No locks available"), held(tmp_path):
        pass


def test_what_fails_while_a_lock_is_held_is_raised_as_it_is(tmp_path):
    with pytest.raises(OSError, match="disk"), held(tmp_path):
        raise OSError("disk")


def held(folder: Path) -> AbstractContextManager[None]:
    return Store(str(folder / "out")).lock("lock", shared=False)
