"""The connector's pure part: batches in, batches out, on an engine in this process."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dspark_batch.core import Request
from dspark_batch.engine.config import EngineConfig
from dspark_batch.spark.calls import ARGUMENTS, generate_calls
from dspark_batch.spark.host import EngineHost
from dspark_batch.spark.jobs import resolve_column_config, resolve_config
from dspark_batch.spark.rows import added_schema, generate_batches
from dspark_batch.testing.counting_engine import FACTORY, EngineFolder
from dspark_batch.testing.scripted_engine import scripted_result

HOT = {"temperature": 0.8, "seed": 5, "max_new_tokens": 6}


@pytest.fixture
def engine(tmp_path) -> EngineFolder:
    return EngineFolder.make(tmp_path)


@pytest.fixture
def client(engine):
    host = EngineHost(EngineConfig(target=str(engine.path)), factory=FACTORY)
    yield host
    host.close()


def batches(num_rows: int, *, size: int) -> list[pa.RecordBatch]:
    table = pa.table({"key": range(num_rows), "body": [f"row {n}" if n % 5 else None for n in range(num_rows)]})
    return table.to_batches(max_chunksize=size)


@pytest.mark.parametrize(("size", "chunk"), [(7, 3), (3, 64), (29, 5), (1, 1)])
def test_rows_come_out_in_order_with_the_texts_of_the_oracle(client, size: int, chunk: int) -> None:
    values = {"prompt": {"template": "{{ body }}"}, "sampling": HOT, "spark": {"rows_per_chunk": chunk}}
    job = resolve_config(values, id="key")
    out = pa.Table.from_batches(generate_batches(batches(29, size=size), job=job, client=client)).to_pylist()
    assert [row["key"] for row in out] == list(range(29))
    for row in out:
        if row["key"] % 5 == 0:
            assert (row["generated"], row["error"]["code"]) == (None, "null_prompt")
        else:
            request = Request(id=str(row["key"]), prompt=row["body"], sampling=job.sampling.to_params())
            assert row["generated"] == scripted_result(request).text


def test_every_batch_has_the_declared_columns_in_the_declared_order(client) -> None:
    job = resolve_config({"prompt": {"template": "{{ body }}"}, "output": {"token_ids": True}}, id="key")
    declared = pa.schema([("key", pa.int64()), ("body", pa.string()), *added_schema(job)])
    out = list(generate_batches(batches(20, size=7), job=job, client=client))
    assert {batch.schema for batch in out} == {declared}


def test_only_the_chosen_columns_are_carried(client) -> None:
    job = resolve_config({"prompt": {"template": "{{ body }}"}, "input": {"columns": ["key"]}})
    out = pa.Table.from_batches(generate_batches(batches(9, size=4), job=job, client=client))
    assert out.column_names == ["key", *added_schema(job).names]


def test_samples_stand_beside_their_row(client) -> None:
    job = resolve_config({"prompt": {"template": "{{ body }}"}, "sampling": {**HOT, "n": 2}}, id="key")
    out = pa.Table.from_batches(generate_batches(batches(6, size=4), job=job, client=client))
    assert out["key"].to_pylist() == [key for key in range(6) for _ in range(2)]
    assert out["sample"].to_pylist() == [0, 1] * 6


def calls(prompts: list[str | None], **arguments: object) -> tuple[pa.Array, ...]:
    types = [pa.string(), pa.string(), pa.int32(), pa.float64(), pa.float64(), pa.int64()]
    columns = {"prompt": prompts, **arguments}
    return tuple(
        pa.array(columns.get(name) or [None] * len(prompts), type=kind)
        for name, kind in zip(ARGUMENTS, types, strict=True)
    )


def test_calls_give_one_struct_each_in_order_and_null_for_null(client, engine) -> None:
    job = resolve_column_config({"sampling": HOT, "spark": {"rows_per_chunk": 4}})
    prompts = [f"p{n}" if n % 3 else None for n in range(17)]
    ids = [str(n) for n in range(17)]
    parts = [calls(prompts[start : start + 6], id=ids[start : start + 6]) for start in range(0, 17, 6)]
    out = [struct for array in generate_calls(parts, job=job, client=client) for struct in array.to_pylist()]
    for number, struct in enumerate(out):
        if number % 3 == 0:
            assert struct is None
        else:
            request = Request(id=str(number), prompt=f"p{number}", sampling=job.sampling.to_params())
            assert struct["text"] == scripted_result(request).text
    assert len(engine.rows()) == 11


def test_calls_with_other_sampling_share_the_batch_and_keep_their_places(client) -> None:
    job = resolve_column_config({"sampling": {"max_new_tokens": 8}})
    limits = [1, 5, None, 1, 2, 5, -3]
    out = next(iter(generate_calls([calls([f"p{n}" for n in range(7)], max_tokens=limits)], job=job, client=client)))
    structs = out.to_pylist()
    assert structs[6]["error"]["code"] == "invalid_sampling"
    assert "max_new_tokens" in structs[6]["error"]["message"]
    for number, (limit, struct) in enumerate(zip(limits[:6], structs, strict=False)):
        sampling = job.sampling.model_copy(update={"max_new_tokens": limit or 8}).to_params()
        assert struct["text"] == scripted_result(Request(id="", prompt=f"p{number}", sampling=sampling)).text


def test_a_literal_argument_of_length_one_stands_for_every_row(client) -> None:
    job = resolve_column_config({})
    arrays = list(calls(["a", "b", "c"]))
    arrays[ARGUMENTS.index("max_tokens")] = pa.array([1], pa.int32())
    structs = next(iter(generate_calls([tuple(arrays)], job=job, client=client))).to_pylist()
    assert [struct["num_generated_tokens"] for struct in structs] == [1, 1, 1]


def test_nothing_but_nulls_and_no_rows_at_all(client, engine) -> None:
    job = resolve_column_config({})
    parts = [calls([None, None]), calls([])]
    assert [array.to_pylist() for array in generate_calls(parts, job=job, client=client)] == [[None, None]]
    assert engine.rows() == []
