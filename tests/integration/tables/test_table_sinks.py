"""Delta and Iceberg outputs: each row exactly once through the table, whatever is killed and whenever."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from dspark_batch.core import ErrorCode
from dspark_batch.errors import ConfigError, OutputError
from dspark_batch.job.config import JobConfig
from dspark_batch.testing.engine_factories import EchoingEngine
from dspark_batch.testing.faulty_store import FaultyStore, SimulatedCrashError
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.scripted_engine import ScriptedEngine
from dspark_batch.testing.table_outputs import NUM_ROWS, TableOutput, rows_of

NUMBERS = list(range(NUM_ROWS))


def numbers(table: TableOutput) -> list[int]:
    return [row["n"] for row in table.read()]


def test_the_table_gets_every_row_in_one_transaction(make_table):
    table = make_table()
    assert start_run(table.config()) == 5
    assert numbers(table) == NUMBERS
    assert all(row["answer"] and row["error"] is None for row in table.read())
    before = table.num_versions()
    assert start_run(table.config()) == 0
    assert table.num_versions() == before
    assert numbers(table) == NUMBERS


def test_nothing_is_visible_before_the_last_shard(make_table):
    table = make_table()
    path = table.config().output.path
    with pytest.raises(SimulatedCrashError):
        start_run(table.config(), store=FaultyStore(path, fail_at=14))
    assert numbers(table) == []
    assert start_run(table.config()) < 5
    assert numbers(table) == NUMBERS


def test_killed_at_any_change_and_started_again_every_row_is_there_once(make_table):
    counted = make_table("count")
    counting = FaultyStore(counted.config().output.path)
    start_run(counted.config(), store=counting)
    expected = [(row["n"], row["answer"]) for row in counted.read()]
    total = counting.num_changes
    points = sorted({*range(1, total + 1, 7), *range(total - 8, total + 1)})
    seen = set()
    for fail_at in points:
        table = make_table(f"at{fail_at}")
        with pytest.raises(SimulatedCrashError):
            start_run(table.config(), store=FaultyStore(table.config().output.path, fail_at=fail_at))
        seen.add(len(table.read()))
        start_run(table.config())
        assert [(row["n"], row["answer"]) for row in table.read()] == expected
        start_run(table.config())
        assert numbers(table) == NUMBERS
    assert seen == {0, NUM_ROWS}


def test_rows_that_are_generated_again_replace_the_published_ones(make_table):
    table = make_table()
    failing = ScriptedEngine(failures={"Say text 3": ErrorCode.ENGINE_ERROR, "Say text 30": ErrorCode.ENGINE_ERROR})
    start_run(table.config(), engine=failing)
    assert sum(row["error"] is not None for row in table.read()) == 2
    retry_failed(table)
    assert numbers(table) == NUMBERS
    assert all(row["error"] is None for row in table.read())


def retry_failed(table: TableOutput) -> None:
    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.executor import ShardExecutor, WorkerSpec
    from dspark_batch.batch.finish import finish_run
    from dspark_batch.batch.shards import Plan

    config = table.config()
    run = RunStore(config.output.path, format=config.output.format)
    plan = Plan.from_json(run.read_meta("plan.json"), source="plan")
    run.join("")
    fingerprint = next(iter(run.committed().values())).fingerprint
    run.join(fingerprint)
    spec = WorkerSpec(
        config=config,
        plan_schema=plan.schema,
        fingerprint=fingerprint,
        run_id="again",
        retry_failed=True,
        engine_factory="dspark_batch.testing.engine_factories:scripted",
        ticket=run.ticket,
    )
    with ShardExecutor(spec) as executor:
        for shard in plan.shards:
            executor.run(shard)
    finish_run(run, plan=plan, config=config)


@pytest.mark.parametrize("late", [False, True])
def test_overwrite_replaces_the_table_in_one_step_and_not_before(make_table, late):
    table = make_table()
    start_run(table.config())
    old = table.read()
    config = table.config(output={"mode": "overwrite"}, sampling={"temperature": 0.5, "seed": 7})
    counting = FaultyStore(config.output.path, fail_at=None)
    if late:
        with pytest.raises(SimulatedCrashError):
            start_run(config, store=FaultyStore(config.output.path, fail_at=20))
        assert table.read() == old
    start_run(config, store=counting)
    new = table.read()
    assert [row["n"] for row in new] == NUMBERS
    assert new != old
    assert start_run(config.model_copy(update={"output": table.config().output})) == 0


def test_a_nightly_run_adds_the_rows_of_new_files_only(make_table):
    table = make_table()
    config = table.config(input={"incremental": "files"})
    assert start_run(config) == 5
    table.write_input("b.parquet", rows_of(NUM_ROWS, 60))
    assert start_run(config) == 3
    assert numbers(table) == list(range(60))
    assert start_run(config) == 0
    table.write_input("c.parquet", rows_of(60, 62))
    path = config.output.path
    with pytest.raises(SimulatedCrashError):
        start_run(config, store=FaultyStore(path, fail_at=9))
    table.write_input("d.parquet", rows_of(62, 63))
    start_run(config)
    assert numbers(table) == list(range(63))


def test_rows_of_others_in_the_table_stay(make_table):
    table = make_table()
    start_run(table.config())
    if table.format == "delta":
        for name in ("_dspark", "_SUCCESS"):
            (table.folder / "out" / name).rename(table.folder / name)
        config = table.config(sampling={"temperature": 0.5, "seed": 3})
    else:
        config = table.config(sampling={"temperature": 0.5, "seed": 3}, output={"path": str(table.folder / "other")})
    start_run(config)
    assert numbers(table) == sorted(2 * NUMBERS)


def test_a_table_with_other_columns_is_refused(make_table):
    table = make_table()
    start_run(table.config())
    other = {"path": str(table.folder / "other")} if table.format == "iceberg" else {"mode": "overwrite"}
    with pytest.raises(OutputError, match="has other columns than this run writes"):
        start_run(table.config(input={"columns": ["id", "n"]}, output=other))
    assert numbers(table) == NUMBERS


def test_columns_that_the_format_lacks_are_refused_before_anything_is_generated(make_table):
    table = make_table()
    odd = rows_of(0, 3).append_column("odd", pa.array([1, 2, 3], pa.uint64()))
    table.write_input("a.parquet", odd)
    with pytest.raises(ConfigError, match=r"column .odd. has type uint64, which"):
        start_run(table.config())
    start_run(table.config(input={"columns": ["id", "text", "n"]}))
    assert numbers(table) == [0, 1, 2]


MOMENT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.list_(pa.float32(), 2), [[1.0, 2.0], None, [3.0, 4.0]]),
        (pa.struct([("v", pa.list_(pa.int32(), 1))]), [{"v": [1]}, {"v": [2]}, None]),
        (pa.timestamp("us", "Europe/Berlin"), [MOMENT, None, MOMENT]),
        (pa.map_(pa.string(), pa.int64()), [[("a", 1)], None, []]),
        (pa.dictionary(pa.int32(), pa.large_string()), ["a", None, "a"]),
    ],
    ids=str,
)
def test_columns_that_the_format_has_another_form_of_are_published_and_tried_again(make_table, kind, values):
    table = make_table()
    table.write_input("a.parquet", rows_of(0, 3).append_column("odd", pa.array(values, kind)))
    start_run(table.config(), engine=ScriptedEngine(failures={"Say text 1": ErrorCode.ENGINE_ERROR}))
    assert [row["odd"] for row in table.read()] == values
    retry_failed(table)
    assert [row["odd"] for row in table.read()] == values
    assert all(row["error"] is None for row in table.read())


def test_values_of_a_json_schema_are_published_with_their_types(make_table):
    item = {"type": "object", "properties": {"a name": {"type": "string"}, "n": {"type": "integer"}}}
    properties = {"items": {"type": "array", "items": item}, "x": {"type": "number"}, "any": {}}
    schema = {"type": "object", "properties": properties}
    values = [
        {"items": [{"a name": "a", "n": 2**63 - 1}, {"a name": None, "n": 0}], "x": 0.5, "any": '{"k":[true]}'},
        {"items": [], "x": None, "any": None},
        None,
    ]
    given = [
        '{"items":[{"a name":"a","n":9223372036854775807},{"n":0}],"x":0.5,"any":{"k":[true]}}',
        '{"items":[]}',
        "{",
    ]
    table = make_table()
    table.write_input("a.parquet", pa.table({"id": ["a", "b", "c"], "text": given, "n": [0, 1, 2]}))
    config = table.config(sampling={"temperature": 0.0, "json_schema": schema}, prompt={"template": "{{ text }}"})
    start_run(config.model_copy(update={"task": "extract"}), engine=EchoingEngine())
    rows = table.read()
    assert [row["answer"] for row in rows] == values
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, None, "incomplete_json"]


@pytest.mark.parametrize("kind", [pa.int16(), pa.binary(2), pa.time64("us"), pa.timestamp("ns"), pa.uint8()], ids=str)
def test_each_type_is_either_published_or_refused_before_anything_is_generated(make_table, kind):
    table = make_table()
    values = [b"ab"] * 3 if kind == pa.binary(2) else pa.array([1, 2, 3], pa.int64()).cast(kind)
    table.write_input("a.parquet", rows_of(0, 3).append_column("odd", pa.array(values, kind)))
    engine = ScriptedEngine()
    if kind == {"delta": pa.int16(), "iceberg": pa.binary(2)}[table.format]:
        start_run(table.config(), engine=engine)
        assert numbers(table) == [0, 1, 2]
        return
    with pytest.raises(ConfigError, match="column 'odd' has type"):
        start_run(table.config(), engine=engine)
    assert engine.counters.num_requests == 0


def test_a_table_that_does_not_fit_is_refused_before_anything_is_generated(make_table):
    table = make_table()
    table.make(pa.schema([("n", pa.int64()), ("day", pa.string())]), partition_by="day")
    engine = ScriptedEngine()
    with pytest.raises(OutputError, match="is partitioned, which is not supported"):
        start_run(table.config(), engine=engine)
    other = make_table("other")
    other.make(pa.schema([("n", pa.int64())]))
    with pytest.raises(OutputError, match="has other columns than this run writes"):
        start_run(other.config(), engine=engine)
    assert engine.counters.num_requests == 0


def test_planning_makes_no_table(make_table):
    table = make_table()
    with pytest.raises(SimulatedCrashError):
        start_run(table.config(), store=FaultyStore(table.config().output.path, fail_at=1))
    assert not table.is_made()


def test_a_table_that_was_rolled_back_is_refused_rather_than_doubled(make_table):
    table = make_table()
    start_run(table.config())
    record = table.folder / "out" / "_dspark" / "published.json"
    record.write_text(record.read_text().replace('"version": 1', '"version": 3'))
    (table.folder / "out" / "_SUCCESS").unlink()
    with pytest.raises(OutputError, match="published 3 times and its table knows of 1"):
        start_run(table.config())


def test_probabilities_of_choices_are_published(make_table):
    table = make_table()
    values = table.config(sampling={"temperature": 0.0, "choices": ["a", "b", "c"]}).model_dump(mode="json")
    start_run(JobConfig.model_validate({**values, "task": "classify"}))
    for row in table.read():
        probabilities = dict(row["probabilities"])
        assert sum(probabilities.values()) == pytest.approx(1)
        assert probabilities[row["answer"]] == row["probability"] == max(probabilities.values())
