"""A hung engine is noticed, a slow one is not; no test waits for a real time-out but those that hang a real thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.service import WorkerService
from dspark_batch.batch.shards import Plan, make_plan
from dspark_batch.batch.watchdog import LOOKS_PER_TIMEOUT, SLOWEST_FACTOR, Watchdog
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.errors import EngineError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.scripted_engine import ScriptedEngine

MakeConfig = Callable[..., JobConfig]
TIMEOUT_S, FIRST_S = 20.0, 100.0
TICK_S = TIMEOUT_S / LOOKS_PER_TIMEOUT


@dataclass
class Engine:
    """An engine as the watchdog sees it, under a clock of its own."""

    now_s: float = 0.0
    num_processed: int = 0
    is_busy: bool = True
    hangs_s: list[float] = field(default_factory=list)

    def watchdog(self) -> Watchdog:
        return Watchdog(
            timeout_s=TIMEOUT_S,
            first_timeout_s=FIRST_S,
            progress=lambda: self.num_processed,
            is_busy=lambda: self.is_busy,
            on_hang=self.hangs_s.append,
            clock=lambda: self.now_s,
        )

    def stand_still(self, watchdog: Watchdog, seconds: float) -> None:
        """Looks of the watchdog for so long, until it gives the engine up."""
        for _ in range(int(seconds / TICK_S)):
            self.now_s += TICK_S
            if not watchdog.look():
                return

    def work(self, watchdog: Watchdog, *, pause_s: float) -> None:
        self.stand_still(watchdog, pause_s)
        self.num_processed += 1
        self.now_s += TICK_S
        assert watchdog.look()


def test_an_engine_that_stands_still_for_longer_than_the_timeout_hangs() -> None:
    engine = Engine()
    watchdog = engine.watchdog()
    engine.work(watchdog, pause_s=0)
    engine.work(watchdog, pause_s=0)
    engine.stand_still(watchdog, TIMEOUT_S)
    assert engine.hangs_s == []
    engine.stand_still(watchdog, 2 * TICK_S)
    assert engine.hangs_s == [TIMEOUT_S + TICK_S]


def test_the_first_progress_may_take_as_long_as_loading() -> None:
    engine = Engine()
    watchdog = engine.watchdog()
    engine.work(watchdog, pause_s=FIRST_S - TICK_S)
    assert engine.hangs_s == []
    other = Engine()
    other.stand_still(other.watchdog(), 2 * FIRST_S)
    assert other.hangs_s == [FIRST_S + TICK_S]


def test_an_engine_that_is_slow_throughout_does_not_hang() -> None:
    engine = Engine()
    watchdog = engine.watchdog()
    engine.work(watchdog, pause_s=0)
    for _ in range(5):
        engine.work(watchdog, pause_s=TIMEOUT_S - 2 * TICK_S)
    engine.work(watchdog, pause_s=5 * TIMEOUT_S)
    assert engine.hangs_s == []
    assert watchdog.limit_s > SLOWEST_FACTOR * 5 * TIMEOUT_S


def test_time_without_work_and_time_in_which_the_process_stood_still_do_not_count() -> None:
    engine = Engine()
    watchdog = engine.watchdog()
    engine.work(watchdog, pause_s=0)
    engine.is_busy = False
    engine.stand_still(watchdog, 10 * TIMEOUT_S)
    engine.is_busy = True
    engine.now_s += 10 * TIMEOUT_S
    assert watchdog.look()
    assert engine.hangs_s == []


class HangingEngine(ScriptedEngine):
    """Stands still in its second step until the test lets it go on."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(max_concurrency=1)
        self.gate = gate
        self.reached = threading.Event()

    def step(self):
        if self.counters.num_steps == 1:
            self.reached.set()
            assert self.gate.wait(60)
        return super().step()


def test_an_abandoned_service_ends_its_futures_takes_no_more_and_closes_without_its_thread(
    make_config: MakeConfig,
) -> None:
    gate = threading.Event()
    engine = HangingEngine(gate)
    table = pa.table({"text": [f"row {n}" for n in range(9)]})
    shard = ShardInput(key="s", table=table, ids=tuple(map(str, range(9))))
    service = WorkerService(lambda: BatchWorker(engine, config=make_config(), input_schema=table.schema)).start()
    running = service.submit(shard)
    assert engine.reached.wait(60)
    waiting = service.submit(ShardInput(key="t", table=table, ids=shard.ids))
    service.abandon(EngineError("it hangs"))
    for future in (running, waiting):
        with pytest.raises(EngineError, match="it hangs"):
            future.result(0)
    with pytest.raises(EngineError, match="it hangs"):
        service.submit(shard)
    service.close()
    assert service.thread.is_alive()
    gate.set()
    service.thread.join(60)
    assert not service.thread.is_alive()


def hung_run(make_config: MakeConfig, tmp_path, **options) -> tuple[WorkerSpec, Plan]:
    folder = EngineFolder.make(tmp_path / "engine", hang_once_after_rows=2, max_concurrency=2, **options)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(12)]}), tmp_path / "in" / "a.parquet")
    config = make_config(model={"target": str(folder.path)}, engine={"watchdog_s": 1.0}, ray={"load_timeout_s": 1.0})
    plan = make_plan(config.input, max_rows=100)
    spec = WorkerSpec(config=config, plan_schema=plan.schema, fingerprint="f", run_id="r", engine_factory=FACTORY)
    spec.open_store().open({"any": "field"})
    return spec, plan


def test_a_hung_engine_fails_its_shard_with_what_hangs_since_when_and_where(
    make_config: MakeConfig, tmp_path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec, plan = hung_run(make_config, tmp_path)
    with ShardExecutor(spec) as executor, pytest.raises(EngineError) as caught:
        executor.run(plan.shards[0])
    message = str(caught.value)
    assert "the engine hangs: no progress for" in message
    assert "in a decoding round with" in message
    assert "counting_engine.py:" in message
    assert "engine.watchdog_s" in message
    stacks = capfd.readouterr().err
    assert "Thread 0x" in stacks
    assert "counting_engine.py" in stacks
