"""Plan, read, generate, commit: killed at any change of the store and started again, every row comes out once."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.fingerprint import fingerprint_fields
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import make_plan
from dspark_batch.batch.store import Store
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.errors import EngineError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.faulty_store import FaultyStore, SimulatedCrashError
from dspark_batch.testing.scripted_engine import ScriptedEngine

NUM_ROWS = 53
NUM_SHARDS = 6


def write_input(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(3)
    texts = [None if rng.random() < 0.2 else f"t{rng.randrange(20)}" for _ in range(NUM_ROWS)]
    table = pa.table({"n": list(range(NUM_ROWS)), "text": texts})
    pq.write_table(table.slice(0, 30), folder / "a.parquet", row_group_size=7)
    pq.write_table(table.slice(30), folder / "b.parquet", row_group_size=11)


def run(config: JobConfig, *, store: Store, engine: ScriptedEngine) -> int:
    """One start of a run, as a driver does it; the number of shards that it made."""
    output = RunStore(config.output.path, store=store)
    plan = make_plan(config.input, max_rows=config.shards.rows, saved=output.read_meta("plan.json"))
    output.open(fingerprint_fields(config, weights_fingerprint="w", input_digest=plan.digest), mode="resume")
    output.write_meta("plan.json", plan.to_json())
    reader = ShardReader(config, plan_schema=plan.schema)
    worker = BatchWorker(engine, config=config, input_schema=reader.schema)
    done = output.committed()
    todo = [shard for shard in plan.shards if shard.name not in done]
    for finished in worker.run_shards(reader.read(shard) for shard in todo):
        output.commit(finished)
    output.finish()
    reader.close()
    return len(todo)


@pytest.fixture
def config(make_config, tmp_path: Path) -> JobConfig:
    write_input(tmp_path / "in")
    return make_config(shards={"rows": 10}, sampling={"temperature": 1.0}, output={"path": str(tmp_path / "out")})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The output of a run over equal files elsewhere, in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_input(folder / "in")
    config = JobConfig.model_validate(
        {
            "input": {"path": str(folder / "in")},
            "prompt": {"template": "Summarise: {{ text }}"},
            "output": {"path": str(folder / "out"), "column": "summary"},
            "sampling": {"temperature": 1.0},
            "shards": {"rows": 50},
        }
    )
    run(config, store=Store(config.output.path), engine=ScriptedEngine(max_concurrency=2))
    return read_output(config.output.path)


@pytest.mark.parametrize("fail_at", range(1, 20))
def test_killed_once_at_any_change(config, undisturbed, fail_at):
    path = config.output.path
    with pytest.raises(SimulatedCrashError):
        run(config, store=FaultyStore(path, fail_at=fail_at), engine=ScriptedEngine())
    run(config, store=Store(path), engine=ScriptedEngine(max_concurrency=3))
    assert read_output(path).equals(undisturbed)
    assert read_output(path)["n"].to_pylist() == list(range(NUM_ROWS))
    output = RunStore(path)
    output.sweep(min_age_s=0)
    output.check_integrity()
    assert run(config, store=Store(path), engine=ScriptedEngine()) == 0


def test_killed_again_and_again(config, undisturbed):
    rng = random.Random(7)
    path = config.output.path
    num_kills = 0
    while True:
        try:
            run(config, store=FaultyStore(path, fail_at=rng.randrange(3, 9)), engine=ScriptedEngine())
            break
        except SimulatedCrashError:
            num_kills += 1
            if num_kills > 50:
                pytest.fail("no progress over 50 starts")
    assert num_kills >= 1
    assert read_output(path).equals(undisturbed)


def test_an_engine_fault_loses_no_committed_shard(config, undisturbed):
    path = config.output.path
    with pytest.raises(EngineError):
        run(config, store=Store(path), engine=ScriptedEngine(fault_after_rows=25))
    num_kept = len(RunStore(path).committed())
    assert num_kept > 0
    assert run(config, store=Store(path), engine=ScriptedEngine()) == NUM_SHARDS - num_kept
    assert read_output(path).equals(undisturbed)


def test_deleting_one_output_file_makes_exactly_that_shard(config, undisturbed):
    path = config.output.path
    run(config, store=Store(path), engine=ScriptedEngine())
    victim = sorted(Path(path).glob("*.parquet"))[2]
    victim.unlink()
    engine = ScriptedEngine()
    assert run(config, store=Store(path), engine=engine) == 1
    assert engine.counters.num_requests <= 10
    assert read_output(path).equals(undisturbed)


def test_a_failed_save_is_fatal_and_resumable(config, undisturbed):
    path = config.output.path
    full = OSError(28, "No space left on device")
    with pytest.raises(Exception, match="No space left"):
        run(config, store=FaultyStore(path, fail_at=11, error=full, num_failures=9), engine=ScriptedEngine())
    run(config, store=Store(path), engine=ScriptedEngine())
    assert read_output(path).equals(undisturbed)
