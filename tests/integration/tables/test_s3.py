"""Input and output on an S3-compatible server on the loopback interface."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.lease import acquire_lease
from dspark_batch.batch.store import Store
from dspark_batch.errors import LeaseLostError, OutputError, TransientStorageError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.scripted_engine import ScriptedEngine

REQUEST_TIMEOUT_S = 0.5


class MoodyServer:
    """Passes requests on. The next ``num_slow`` writes of shards and manifests wait longer than the client does, and
    the next ``num_busy`` are refused as an overloaded store does."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.num_slow = 0
        self.num_busy = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and "/out/" in environ["PATH_INFO"]:
            if self.num_slow > 0:
                self.num_slow -= 1
                time.sleep(2 * REQUEST_TIMEOUT_S)
            elif self.num_busy > 0:
                self.num_busy -= 1
                start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return self._app(environ, start_response)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, MoodyServer]]:
    pytest.importorskip("moto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        moody = MoodyServer(DomainDispatcherApplication(create_backend_app))
        server = make_server("127.0.0.1", 0, moody, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", moody
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def endpoint(server: tuple[str, MoodyServer]) -> str:
    return server[0]


@pytest.fixture
def moody(server: tuple[str, MoodyServer]) -> Iterator[MoodyServer]:
    yield server[1]
    server[1].num_slow = server[1].num_busy = 0


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


def hasty_store(endpoint: str, bucket: str) -> Store:
    """The output of ``config_of``, through a client that gives up early and leaves all retrying to the store."""
    client = fs.S3FileSystem(
        access_key="test",
        secret_key="test",
        region="us-east-1",
        endpoint_override=endpoint,
        scheme="http",
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_bucket_creation=True,
    )
    inner = (bucket % "out").removeprefix("s3://").partition("?")[0]
    return Store(inner, filesystem=client, backoff_s=0.01)


@pytest.mark.parametrize(("num_slow", "num_busy"), [(2, 0), (0, 3)], ids=["time-outs", "throttling"])
def test_an_object_store_that_is_slow_or_busy_for_a_while_is_waited_out(endpoint, moody, bucket, num_slow, num_busy):
    config = config_of(bucket)
    moody.num_slow, moody.num_busy = num_slow, num_busy
    assert start_run(config, store=hasty_store(endpoint, bucket)) == 3
    assert (moody.num_slow, moody.num_busy) == (0, 0)
    assert numbers(config) == list(range(30))
    RunStore(config.output.path).join("").check_integrity()


def test_time_outs_of_an_object_store_that_do_not_end_are_named_and_the_same_command_goes_on(endpoint, moody, bucket):
    config = config_of(bucket)
    moody.num_busy = 10**6
    with pytest.raises(TransientStorageError, match=r"cannot write .* after 4 tries: .*SLOW_DOWN"):
        start_run(config, store=hasty_store(endpoint, bucket))
    moody.num_busy = 0
    assert start_run(config) > 0
    assert numbers(config) == list(range(30))
