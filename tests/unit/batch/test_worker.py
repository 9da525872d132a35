from __future__ import annotations

import datetime
import random
from collections import Counter
from dataclasses import asdict
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.prompts import PromptRenderer
from dspark_batch.batch.results import ShardStats, assemble
from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.worker import BatchWorker, check_schema
from dspark_batch.core import ErrorCode, FinishReason, Request, Result, RowError
from dspark_batch.errors import ConfigError, EngineError
from dspark_batch.testing.scripted_engine import ScriptedEngine, scripted_result

HOT = {"temperature": 1.0}


def shard(key: str, texts: list[str | None]) -> ShardInput:
    table = pa.table({"text": pa.array(texts, pa.string())})
    return ShardInput(key=key, table=table, ids=tuple(f"{key}#{row}" for row in range(len(texts))))


def worker_of(config, engine: ScriptedEngine, *, schema: pa.Schema | None = None) -> BatchWorker:
    return BatchWorker(engine, config=config, input_schema=schema or pa.schema([("text", pa.string())]))


def oracle(config, given: ShardInput) -> list[str | None]:
    """One row at a time, without an engine."""
    made = PromptRenderer(
        config.prompt, sampling=config.sampling.to_params(), input_schema=given.table.schema, has_chat_template=False
    )
    outcomes = [made.render(row, row_id=i) for row, i in zip(given.table.to_pylist(), given.ids, strict=True)]
    return [
        scripted_result(outcome, sample=sample).text if isinstance(outcome, Request) else None
        for outcome in outcomes
        for sample in range(config.sampling.n)
    ]


@pytest.mark.parametrize("sampling", [{}, HOT, {**HOT, "n": 3}])
@pytest.mark.parametrize("concurrency", [1, 7, 32])
def test_every_row_of_ragged_shards_comes_back_in_order(make_config, sampling, concurrency):
    rng = random.Random(concurrency)
    sizes = [11, 0, 1, 29, 2, 5, 0, 17]
    shards = [
        shard(f"s{place}", [rng.choice([None, f"t{rng.randrange(9)}"]) for _ in range(size)])
        for place, size in enumerate(sizes)
    ]
    config = make_config(sampling=sampling)
    worker = worker_of(config, ScriptedEngine(max_concurrency=concurrency, max_steps=5))
    results = {result.key: result for result in worker.run_shards(shards)}
    assert sorted(results) == sorted(given.key for given in shards)
    for given in shards:
        table = results[given.key].table
        assert table.schema == worker.output_schema
        assert table["summary"].to_pylist() == oracle(config, given)
        assert table.num_rows == len(given.ids) * config.sampling.n
    worker.check_integrity()


def test_samples_of_a_row_stand_together_under_its_columns(make_config):
    worker = worker_of(make_config(sampling={**HOT, "n": 2}), ScriptedEngine())
    (result,) = worker.run_shards([shard("s", ["a", None])])
    rows = result.table.select(["text", "sample", "finish_reason"]).to_pylist()
    assert [(row["text"], row["sample"]) for row in rows] == [("a", 0), ("a", 1), (None, 0), (None, 1)]
    assert [row["finish_reason"] for row in rows[2:]] == ["error", "error"]
    assert (result.stats.num_rows, result.stats.num_output_rows, result.stats.num_failed_rows) == (2, 4, 1)


def test_slots_are_never_idle_between_shards(make_config):
    engine = ScriptedEngine(max_concurrency=8, max_steps=4)
    worker = worker_of(make_config(sampling=HOT), engine)
    shards = [shard(f"s{place}", [f"{place} {row}" for row in range(13)]) for place in range(20)]
    num_idle_before_the_last = []

    def taken():
        for given in shards:
            num_idle_before_the_last.append(engine.counters.num_idle_slots)
            yield given

    assert len(list(worker.run_shards(taken()))) == 20
    assert num_idle_before_the_last[-1] == 0
    assert engine.counters.max_running == 8


@pytest.mark.parametrize(("limit", "open_at_most"), [(2, 1), (5, 4), (None, 9)])
def test_a_limit_on_open_shards_is_kept(make_config, limit, open_at_most):
    worker = worker_of(make_config(sampling=HOT), ScriptedEngine(max_concurrency=64, max_steps=4))
    most = 0

    def taken():
        nonlocal most
        for place in range(10):
            most = max(most, worker.num_open_shards)
            yield shard(f"s{place}", ["a", "b", "c"])

    assert len(list(worker.run_shards(taken(), max_open_shards=limit))) == 10
    assert most == open_at_most


def test_failed_rows_keep_their_place_and_carry_the_reason(make_config):
    engine = ScriptedEngine(
        failures={"Summarise: b": ErrorCode.PROMPT_TOO_LONG, "Summarise: c": ErrorCode.ENGINE_ERROR}
    )
    (result,) = worker_of(make_config(), engine).run_shards([shard("s", ["a", "b", "c", None])])
    errors = result.table["error"].to_pylist()
    assert [error and error["code"] for error in errors] == [None, "prompt_too_long", "engine_error", "null_prompt"]
    assert result.table["summary"].null_count == 3
    stats = result.stats
    assert (stats.num_failed_rows, stats.num_retryable_rows) == (3, 1)
    assert stats.num_failed_by_code == {"engine_error": 1, "null_prompt": 1, "prompt_too_long": 1}


def counted(rows: list[tuple[Result, ...]], *, num_copied_rows: int) -> ShardStats:
    """The totals of a shard from its results, one by one."""
    flat = [result for row in rows for result in row]
    failed = [[result.error for result in row if result.error is not None] for row in rows]
    failed = [row for row in failed if row]
    totals = {
        name: sum(getattr(result, name) for result in flat)
        for name in ShardStats.__slots__
        if name.endswith(("_tokens", "_rounds"))
    }
    return ShardStats(
        num_rows=len(rows),
        num_output_rows=len(flat),
        num_failed_rows=len(failed),
        num_retryable_rows=sum(any(error.retryable for error in row) for row in failed),
        num_copied_rows=num_copied_rows,
        num_failed_by_code=dict(sorted(Counter(row[0].code.value for row in failed).items())),
        num_cut_samples=sum(result.finish_reason is FinishReason.LENGTH for result in flat),
        **totals,
    )


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("failing", [0.0, 0.3, 1.0])
def test_totals_and_columns_are_those_of_the_results_one_by_one(make_config, num_samples, failing):
    rng = random.Random(f"{num_samples}/{failing}")
    config = make_config(sampling={**HOT, "n": num_samples}, output={"token_ids": True})
    schema = check_schema(config, input_schema=pa.schema([("text", pa.string())]))
    for num_rows in (0, 1, 13):
        given = shard("s", [f"t{row}" for row in range(num_rows)])
        rows = [
            tuple(random_result(rng, row_id, sample=sample, failing=failing) for sample in range(num_samples))
            for row_id in given.ids
        ]
        made = assemble(given, rows, schema=schema, num_samples=num_samples, num_copied_rows=2)
        assert made.stats == counted(rows, num_copied_rows=2)
        found = made.table.to_pylist()
        for line, result in zip(found, (result for row in rows for result in row), strict=True):
            error = result.error
            assert line["summary"] == (None if error else result.text)
            assert line["token_ids"] == (None if error else list(result.token_ids))
            assert line["finish_reason"] == result.finish_reason.value
            assert line["num_drafted_tokens"] == result.num_drafted_tokens
            assert line["error"] == (error and {**asdict(error), "code": error.code.value})


def random_result(rng: random.Random, row_id: str, *, sample: int, failing: float) -> Result:
    request = Request(id=row_id, prompt=str(rng.random()))
    if rng.random() < failing:
        code = rng.choice([ErrorCode.ENGINE_ERROR, ErrorCode.PROMPT_TOO_LONG])
        error = RowError(code=code, message="m", retryable=code is ErrorCode.ENGINE_ERROR)
        return Result.failed(request, error, sample=sample, num_prompt_tokens=rng.randrange(5))
    return scripted_result(request, sample=sample)


def test_process_gives_one_batch_in_the_declared_schema(make_config):
    worker = worker_of(make_config(), ScriptedEngine())
    batch = pa.record_batch({"text": ["a", "b"]})
    assert worker.process(batch, ids=["1", "2"]).schema == worker.output_schema
    assert worker.process(batch.slice(0, 0), ids=[]).num_rows == 0


def test_all_arrow_types_pass_through_untouched(make_config, tmp_path):
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    columns = {
        "text": pa.array(["a", "b", None]),
        "i8": pa.array([1, None, -3], pa.int8()),
        "u64": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "f16": pa.array([0.5, None, 2.0], pa.float16()),
        "dec": pa.array([Decimal("1.23"), None, Decimal("-9.99")], pa.decimal128(20, 2)),
        "dec256": pa.array([Decimal("1.23"), None, Decimal("-9.99")], pa.decimal256(50, 2)),
        "us": pa.array([at, None, at], pa.timestamp("us")),
        "ns_tz": pa.array([1, None, 3], pa.timestamp("ns", tz="Europe/Berlin")),
        "date": pa.array([at.date(), None, at.date()]),
        "time": pa.array([at.time(), None, at.time()], pa.time64("us")),
        "dur": pa.array([1, None, 3], pa.duration("ms")),
        "bin": pa.array([b"\xff", None, b""]),
        "fixed": pa.array([b"abc", None, b"xyz"], pa.binary(3)),
        "large": pa.array(["x", None, "z"], pa.large_string()),
        "dict": pa.array(["u", None, "u"]).dictionary_encode(),
        "list": pa.array([[1], None, []], pa.list_(pa.int16())),
        "fsl": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)),
        "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
        "nested": pa.array(
            [{"a": [{"b": None}]}, None, {"a": []}], pa.struct([("a", pa.list_(pa.struct([("b", pa.int8())])))])
        ),
        "null": pa.nulls(3),
        "bool": pa.array([True, None, False]),
    }
    table = pa.table(columns)
    for step, sampling in ((1, {}), (2, {**HOT, "n": 2})):
        worker = worker_of(make_config(sampling=sampling), ScriptedEngine(), schema=table.schema)
        given = ShardInput(key="s", table=table, ids=("1", "2", "3"))
        (result,) = worker.run_shards([given])
        pq.write_table(result.table, tmp_path / "t.parquet")
        again = pq.read_table(tmp_path / "t.parquet").select(table.column_names)
        for sample in range(step):
            assert result.table.select(table.column_names).take(list(range(sample, 3 * step, step))).equals(table)
            assert again.take(list(range(sample, 3 * step, step))).to_pylist() == table.to_pylist()
        assert again.schema == table.schema


def test_equal_greedy_prompts_are_computed_once_across_open_shards(make_config):
    engine = ScriptedEngine(max_concurrency=4, max_steps=3)
    shards = [shard("s0", ["a", "b", "a", "c", "a"]), shard("s1", ["b", "a", "d"])]
    results = {r.key: r for r in worker_of(make_config(), engine).run_shards(shards)}
    assert engine.counters.num_requests == 4
    assert results["s0"].stats.num_copied_rows + results["s1"].stats.num_copied_rows == 4
    for given in shards:
        assert results[given.key].table["summary"].to_pylist() == oracle(make_config(), given)
    counts = results["s0"].table.select(["num_generated_tokens", "num_rounds"]).to_pylist()
    assert counts[0] == counts[2] == counts[4]


def test_above_temperature_zero_equal_prompts_are_drawn_apart(make_config):
    engine = ScriptedEngine()
    (result,) = worker_of(make_config(sampling=HOT), engine).run_shards([shard("s", ["a"] * 6)])
    assert engine.counters.num_requests == 6
    assert len(set(result.table["summary"].to_pylist())) > 1


def test_copies_of_a_failed_row_fail_alike(make_config):
    engine = ScriptedEngine(failures={"Summarise: a": ErrorCode.NON_FINITE_LOGITS})
    (result,) = worker_of(make_config(), engine).run_shards([shard("s", ["a", "a"])])
    assert result.stats.num_failed_by_code == {"non_finite_logits": 2}
    assert engine.counters.num_requests == 1


def test_an_engine_fault_leaves_run_shards_as_an_engine_error(make_config):
    worker = worker_of(make_config(sampling=HOT), ScriptedEngine(fault_after_rows=3))
    with pytest.raises(EngineError, match="scripted fault"):
        list(worker.run_shards([shard("s", [str(row) for row in range(50)])]))


def test_the_config_is_checked_against_the_schema_with_every_problem_listed(make_config):
    config = make_config(input={"id": "key"}, prompt={"template": "{{ body }}"}, output={"column": "text"})
    with pytest.raises(ConfigError) as caught:
        check_schema(config, input_schema=pa.schema([("text", pa.string())]))
    assert [problem.field for problem in caught.value.problems] == ["prompt.template", "input.id", "output.column"]
