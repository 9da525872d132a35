from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future

import pyarrow as pa
import pytest

from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.service import WorkerService
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.errors import EngineError, ModelError
from dspark_batch.testing.scripted_engine import ScriptedEngine

SCHEMA = pa.schema([("text", pa.string())])


def shard(key: str, num_rows: int) -> ShardInput:
    table = pa.table({"text": [f"{key} {row}" for row in range(num_rows)]})
    return ShardInput(key=key, table=table, ids=tuple(f"{key}#{row}" for row in range(num_rows)))


class GatedEngine(ScriptedEngine):
    """Waits in ``step`` until the test lets it go on."""

    def __init__(self, gate: threading.Event, **rest) -> None:
        super().__init__(**rest)
        self.gate = gate

    def step(self):
        assert self.gate.wait(30)
        return super().step()


def service_of(config, engine: ScriptedEngine) -> WorkerService:
    return WorkerService(lambda: BatchWorker(engine, config=config, input_schema=SCHEMA))


def test_shards_submitted_from_many_threads_all_come_back_whole(make_config):
    config = make_config()
    got: dict[str, pa.Table] = {}
    with service_of(config, ScriptedEngine()) as service:

        def submit(key: str) -> None:
            got[key] = service.submit(shard(key, 17)).result(30).table

        threads = [threading.Thread(target=submit, args=(f"s{place}",)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    alone = BatchWorker(ScriptedEngine(), config=config, input_schema=SCHEMA)
    for key, table in got.items():
        assert table.equals(next(alone.run_shards([shard(key, 17)])).table)
    assert len(got) == 8


def test_shards_in_flight_share_one_batch(make_config):
    gate = threading.Event()
    engine = GatedEngine(gate, max_concurrency=32)
    with service_of(make_config(), engine) as service:
        futures = [service.submit(shard(f"s{place}", 3)) for place in range(4)]
        gate.set()
        assert {future.result(30).key for future in futures} == {"s0", "s1", "s2", "s3"}
    assert engine.counters.max_running > 3


def test_an_engine_fault_ends_every_future_and_later_submits(make_config):
    gate = threading.Event()
    with service_of(make_config(), GatedEngine(gate, fault_after_rows=5)) as service:
        futures = [service.submit(shard(f"s{place}", 40)) for place in range(3)]
        gate.set()
        for future in futures:
            with pytest.raises(EngineError, match="scripted fault"):
                future.result(30)
        assert service.fault is not None
        with pytest.raises(EngineError):
            service.submit(shard("late", 1))


def test_any_other_error_on_the_engine_thread_is_an_engine_error_with_its_cause(make_config):
    class Buggy(ScriptedEngine):
        def step(self):
            raise ZeroDivisionError("oops")

    with service_of(make_config(), Buggy()) as service:
        error = service.submit(shard("s", 2)).exception(30)
    assert isinstance(error, EngineError)
    assert "ZeroDivisionError: oops" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_start_raises_what_making_the_worker_raised():
    def make() -> BatchWorker:
        raise ModelError("no such model")

    service = WorkerService(make)
    with pytest.raises(ModelError, match="no such model"):
        service.start()
    with pytest.raises(RuntimeError, match="closed"):
        service.submit(shard("s", 1))


def test_closing_cancels_what_is_in_flight_and_refuses_more(make_config):
    gate = threading.Event()
    service = service_of(make_config(), GatedEngine(gate)).start()
    future: Future = service.submit(shard("s", 500))
    closer = threading.Thread(target=service.close)
    closer.start()
    gate.set()
    closer.join(30)
    with pytest.raises(CancelledError):
        future.result(30)
    service.close()
    with pytest.raises(RuntimeError, match="closed"):
        service.submit(shard("t", 1))


def test_the_same_shard_twice_in_flight_is_refused(make_config):
    gate = threading.Event()
    with service_of(make_config(), GatedEngine(gate)) as service:
        first, second = service.submit(shard("s", 5)), service.submit(shard("s", 5))
        gate.set()
        assert first.result(30).key == "s"
        assert isinstance(second.exception(30), ValueError)
