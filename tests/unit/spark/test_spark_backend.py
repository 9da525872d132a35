"""The backend's driver side and its task, without a JVM: tasks run in this process."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.executor import WorkerSpec
from dspark_batch.errors import ConfigError, EngineError, ModelError
from dspark_batch.job.drive import Bounds, drive
from dspark_batch.job.loader import config_from_values, dump_config
from dspark_batch.job.outcome import Totals
from dspark_batch.job.prepare import prepare
from dspark_batch.job.progress import LineReport, Work
from dspark_batch.job.signals import StopRequest
from dspark_batch.spark.backend import ShardTask, SparkBackend
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder

NUM_ROWS = 23


class Row:
    def __init__(self, entry: bytes) -> None:
        self.entry = entry


class Frame:
    """As much of a DataFrame as the backend uses."""

    def __init__(self, rows: list[tuple[bytes]], task: ShardTask | None = None) -> None:
        self._rows = rows
        self._task = task

    def repartitionByRange(self, number: int, column: str) -> Frame:
        return self

    def mapInArrow(self, task: ShardTask, schema: str) -> Frame:
        return Frame(self._rows, task)

    def collect(self) -> list[Row]:
        assert self._task is not None
        parts = [pa.record_batch([pa.array([cell], pa.binary())], names=["shards"]) for (cell,) in self._rows]
        return [Row(cell.as_py()) for part in parts for out in self._task(iter([part])) for cell in out.column(0)]


class Conf:
    def get(self, name: str, default: str | None) -> str | None:
        return {"spark.master": "local[3]"}.get(name, default)


class Session:
    conf = Conf()

    def createDataFrame(self, rows: list[tuple[bytes]], schema: str) -> Frame:
        return Frame(rows)


@pytest.fixture
def engine(tmp_path: Path) -> EngineFolder:
    return EngineFolder.make(tmp_path / "engine")


@pytest.fixture
def run(tmp_path: Path, engine: EngineFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_BATCH_ENGINE_FACTORY", FACTORY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pq.write_table(
        pa.table({"id": range(NUM_ROWS), "body": [f"b{n}" for n in range(NUM_ROWS)]}), tmp_path / "in.parquet"
    )
    values = {
        "model": {"target": str(engine.path)},
        "input": {"path": str(tmp_path / "in.parquet"), "id": "id"},
        "prompt": {"template": "{{ body }}"},
        "output": {"path": str(tmp_path / "out")},
        "engine": {"backend": "spark"},
        "shards": {"rows": 3},
    }
    config = tmp_path / "job.yaml"
    config.write_text(dump_config(config_from_values(values, source="test")))
    prepared = prepare(config)
    prepared.store.open(prepared.fields)
    return prepared


def spec_of(run, **changes: object) -> WorkerSpec:
    values = {
        "config": run.config,
        "plan_schema": run.plan.schema,
        "fingerprint": run.fingerprint,
        "run_id": run.store.run_id,
        "engine_factory": FACTORY,
        "ticket": run.store.ticket,
    }
    return WorkerSpec(**{**values, **changes})


def committed(run) -> set[str]:
    return set(RunStore(run.config.output.path).committed())


def test_all_shards_are_committed_once_by_as_many_engines_as_there_are_slots(run, engine: EngineFolder) -> None:
    entries = [entry for entry in SparkBackend(spec_of(run), session=Session()).run(run.plan.shards) if entry]
    assert sorted(entry.shard for entry in entries) == sorted(shard.name for shard in run.plan.shards)
    assert committed(run) == {shard.name for shard in run.plan.shards}
    assert len(engine.loads()) == 3
    assert sorted(engine.rows()) == sorted(f"b{n}" for n in range(NUM_ROWS))


def test_a_second_attempt_generates_only_what_is_not_committed(run, engine: EngineFolder) -> None:
    task = ShardTask(spec_of(run))

    def attempt(shards) -> int:
        part = pa.record_batch([pa.array([pickle.dumps(tuple(shards))], pa.binary())], names=["shards"])
        return sum(batch.num_rows for batch in task(iter([part])))

    assert attempt(run.plan.shards[:2]) == 2
    num_rows = len(engine.rows())
    assert attempt(run.plan.shards[:4]) == 4
    assert len(engine.rows()) == num_rows + sum(shard.num_rows for shard in run.plan.shards[2:4])


def test_after_a_stop_no_shard_begins_and_no_engine_loads(run, engine: EngineFolder) -> None:
    backend = SparkBackend(spec_of(run), session=Session())
    backend.stop()
    assert [entry for entry in backend.run(run.plan.shards) if entry] == []
    assert engine.rows() == []
    assert engine.loads() == []


def test_errors_that_no_attempt_can_mend_reach_the_driver_in_their_own_words(run) -> None:
    spec = spec_of(run, engine_factory="dspark_batch.testing.engine_factories:missing")
    with pytest.raises(ModelError, match="no such checkpoint"):
        list(SparkBackend(spec, session=Session()).run(run.plan.shards))


def test_a_config_that_does_not_fit_is_still_a_config_error_with_its_problems(run) -> None:
    spec = spec_of(run, engine_factory="dspark_batch.testing.engine_factories:no_such_function")
    with pytest.raises(ConfigError) as error:
        list(SparkBackend(spec, session=Session()).run(run.plan.shards))
    assert [problem.field for problem in error.value.problems] == ["DSPARK_BATCH_ENGINE_FACTORY"]


@pytest.mark.parametrize("retry_failed", [False, True])
def test_what_engines_warn_of_reaches_the_driver_once(run, engine: EngineFolder, retry_failed: bool) -> None:
    EngineFolder.make(engine.path, warning="native kernels are off: no compiler")
    backend = SparkBackend(spec_of(run, retry_failed=retry_failed), session=Session())
    told = [backend.warnings() for _ in backend.run(run.plan.shards)]
    assert len(engine.loads()) == 3
    assert told[-1] == ("native kernels are off: no compiler",)
    assert not [name for name in run.store.store.files("_dspark") if "warning" in name]


def test_a_fault_of_an_engine_is_told_before_spark_gives_up(run, engine: EngineFolder) -> None:
    EngineFolder.make(engine.path, break_on={"b5": "raise"})
    backend = SparkBackend(spec_of(run), session=Session())
    stream = io.StringIO()
    work = Work(num_rows=NUM_ROWS, num_shards=len(run.plan.shards), max_tokens_per_row=9)
    with LineReport(work, stream=stream) as report, pytest.raises(EngineError, match="Spark ended the run"):
        drive(
            backend,
            run.plan.shards,
            done=Totals(),
            whole=Totals(),
            bounds=Bounds(max_failed_rows=0, max_generated_tokens=None, max_run_s=None),
            report=report,
            stop=StopRequest(),
        )
    assert "warning: the engine broke, which failed its Spark task: scripted fault over 5\n" in stream.getvalue()


def test_an_error_of_spark_itself_is_an_engine_error_with_its_last_words(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(self: Frame) -> list[Row]:
        raise RuntimeError("Job aborted\nlost executor 3\n\tat org.apache.spark.Foo(Foo.scala:1)\n")

    monkeypatch.setattr(Frame, "collect", collect)
    with pytest.raises(EngineError, match="Spark ended the run: lost executor 3"):
        list(SparkBackend(spec_of(run), session=Session()).run(run.plan.shards))
