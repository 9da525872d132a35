"""Input and output on an S3-compatible server on the loopback interface."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.lease import acquire_lease
from dspark_batch.batch.store import Store
from dspark_batch.errors import LeaseLostError, OutputError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.scripted_engine import ScriptedEngine


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("moto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A URI prefix with ``%s`` for the path."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    uri = f"s3://%s?endpoint_override={endpoint}&scheme=http&allow_bucket_creation=true"
    name = f"b{abs(hash(request.node.name)) % 10**9}"
    filesystem, _ = fs.FileSystem.from_uri(uri % name)
    filesystem.create_dir(name)
    with filesystem.open_output_stream(f"{name}/in/a.parquet") as stream:
        pq.write_table(pa.table({"n": range(30), "text": [f"t{n}" for n in range(30)]}), stream, row_group_size=7)
    return uri.replace("%s", f"{name}/%s")


def config_of(bucket: str, **output: str) -> JobConfig:
    return JobConfig.model_validate(
        {
            "input": {"path": bucket % "in"},
            "prompt": {"template": "Say {{ text }}"},
            "output": {"path": bucket % "out", **output},
            "shards": {"rows": 10},
        }
    )


def numbers(config: JobConfig) -> list[int]:
    return read_output(config.output.path)["n"].to_pylist()


def test_a_run_on_object_storage_resumes_and_is_overwritten(bucket):
    config = config_of(bucket)
    with pytest.raises(Exception, match="scripted fault"):
        start_run(config, engine=ScriptedEngine(max_concurrency=2, fault_after_rows=14))
    assert 0 < len(RunStore(config.output.path).join("").committed()) < 3
    assert start_run(config) > 0
    assert numbers(config) == list(range(30))
    assert start_run(config) == 0
    RunStore(config.output.path).join("").check_integrity()
    assert start_run(config_of(bucket, mode="overwrite")) == 3
    assert numbers(config) == list(range(30))


def test_a_lease_on_object_storage_fences_the_run_that_was_taken_over(bucket):
    config = config_of(bucket)
    start_run(config)
    store = Store(config.output.path)
    with acquire_lease(store, run_id="old", on_conflict="fail", sleep=lambda _: None) as old:
        run = RunStore(config.output.path).join("x")
        run.hold(old)
        with acquire_lease(Store(config.output.path), run_id="new", on_conflict="take_over", sleep=lambda _: None):
            from dspark_batch.batch.results import ShardResult
            from dspark_batch.testing.results import stats_of

            with pytest.raises(LeaseLostError):
                run.commit(ShardResult(key="part-00009-00000000", table=pa.table({"n": [1]}), stats=stats_of(1)))


def test_a_bucket_that_is_not_there_is_named(endpoint, bucket):
    path = f"s3://nowhere/out?endpoint_override={endpoint}&scheme=http"
    run = RunStore(path)
    with pytest.raises(OutputError, match="nowhere"):
        run.open({"a": 1})
