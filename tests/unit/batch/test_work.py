"""What engines note of themselves while they work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_batch.batch.commit import FINGERPRINT_FILE, RunStore
from dspark_batch.batch.live import LiveCounts
from dspark_batch.batch.store import Store
from dspark_batch.batch.work import MAX_MARKS, SAVE_INTERVAL_S, EngineWork, WorkLog
from dspark_batch.errors import OutputError, TransientStorageError


class Engine:
    """A clock, and an engine that generates 10 tokens a second of it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> float:
        return self.now_s

    def counts(self) -> LiveCounts:
        return LiveCounts(num_generated_tokens=int(10 * (self.now_s - 1000.0)), num_steps=int(self.now_s - 1000.0))

    def by_position(self) -> list[tuple[int, int]]:
        return [(5, 4), (3, 1)]


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    run = RunStore(str(tmp_path))
    run.open({"a": 1})
    return run


def log_of(engine: Engine, run: RunStore) -> WorkLog:
    return WorkLog(run, counts=engine.counts, by_position=engine.by_position, clock=engine.clock)


def saved(run: RunStore) -> EngineWork:
    (name,) = run.store.files("_dspark/work")
    return EngineWork.from_json(run.store.read(name) or b"", source=name)


def test_it_begins_with_the_loading_and_is_saved_when_the_last_shard_is_made(run: RunStore) -> None:
    engine = Engine()
    log = log_of(engine, run)
    engine.now_s += 7
    log.start(device="cpu")
    assert (saved(run).load_s, saved(run).engine_s) == (7, 7)
    with log.shard():
        engine.now_s += 5
        with log.shard():
            engine.now_s += 1
        assert saved(run).engine_s == 7
    work = saved(run)
    assert (work.engine_s, work.load_s) == (13, 7)
    assert work.total == LiveCounts(num_generated_tokens=130, num_steps=13)
    assert (work.run_id, work.device, work.by_position) == (run.run_id, "cpu", ((5, 4), (3, 1)))
    assert work.hardware
    engine.now_s += 2
    log.close()
    assert saved(run).engine_s == 15
    log.close()


def test_a_shard_that_failed_counts_too(run: RunStore) -> None:
    engine = Engine()
    log = log_of(engine, run)
    log.start(device=None)

    def fail() -> None:
        with log.shard():
            engine.now_s += 3
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert saved(run).engine_s == 3
    log.close()


def test_a_long_run_keeps_so_many_marks_at_most_and_loses_nothing(run: RunStore) -> None:
    engine = Engine()
    log = log_of(engine, run)
    engine.now_s += 4
    log.start(device="cpu")
    for _ in range(5_000):
        engine.now_s += 1
        log.look()
        assert len(log.work().marks) <= MAX_MARKS + 1
    work = log.work()
    assert len(work.marks) > MAX_MARKS / 3
    assert work.load_s == 4
    assert work.total.num_generated_tokens == 10 * 5_004
    steps = [later - mark for (mark, _), (later, _) in zip(work.marks[1:], work.marks[2:-1], strict=False)]
    assert max(steps) <= 2 * min(steps)
    log.close()


def test_it_is_saved_from_time_to_time(run: RunStore) -> None:
    engine = Engine()
    log = log_of(engine, run)
    log.start(device="cpu")
    engine.now_s += SAVE_INTERVAL_S - 1
    log.look()
    assert saved(run).engine_s == 0
    engine.now_s += 1
    log.look()
    assert saved(run).engine_s == SAVE_INTERVAL_S
    log.close()


def test_a_record_is_read_as_it_was_written_and_lacks_nothing_where_columns_are_new(run: RunStore) -> None:
    log = log_of(Engine(), run)
    log.start(device="cuda")
    work = saved(run)
    assert EngineWork.from_json(work.to_json(), source="x") == work
    values = json.loads(work.to_json())
    values["columns"] = ["time_s", "num_steps", "num_unheard_of"]
    values["marks"] = [[1.0, 0, 8], [3.0, 2, 9]]
    older = EngineWork.from_json(json.dumps(values), source="x")
    assert older.marks == ((1.0, LiveCounts()), (3.0, LiveCounts(num_steps=2)))
    log.close()


@pytest.mark.parametrize("damage", [{"marks": [[1.0, 1]]}, {"columns": None}, {"marks": []}, {"pid": "x"}])
def test_a_damaged_record_is_named(run: RunStore, damage: dict[str, object]) -> None:
    log = log_of(Engine(), run)
    log.start(device=None)
    values = json.loads(saved(run).to_json())
    with pytest.raises(OutputError, match=r"work/a\.json does not say what an engine did"):
        EngineWork.from_json(json.dumps(values | damage), source="work/a.json")
    log.close()


def test_times_that_do_not_rise_are_refused(run: RunStore) -> None:
    log = log_of(Engine(), run)
    log.start(device=None)
    values = json.loads(saved(run).to_json())
    values["marks"].reverse()
    values["marks"][0][0] += 1
    with pytest.raises(OutputError, match="do not rise"):
        EngineWork.from_json(json.dumps(values), source="x")
    log.close()


def test_nothing_is_written_once_the_state_of_the_run_has_gone(run: RunStore) -> None:
    log = log_of(Engine(), run)
    log.start(device=None)
    for name in run.store.files("_dspark/work"):
        run.store.delete(name)
    run.store.delete(f"_dspark/{FINGERPRINT_FILE}")
    log.save()
    assert not run.store.files("_dspark/work")
    log.close()


@pytest.mark.parametrize("error", [OutputError("disk is full"), TransientStorageError("store is slow")])
def test_a_record_that_cannot_be_saved_is_warned_of_once_and_ends_nothing(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Store):
        def write(self, name: str, data: bytes, *, staging: str) -> None:
            if "/work/" in name:
                raise error
            super().write(name, data, staging=staging)

    run = RunStore(str(tmp_path), store=Full(str(tmp_path)))
    run.open({"a": 1})
    log = log_of(Engine(), run)
    log.start(device=None)
    with log.shard():
        pass
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"what this engine does is not recorded for the report: {error}"
    ]
