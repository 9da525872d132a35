"""Columns of generated JSON: their types, their values, and the rows whose text is none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.json_columns import JSON_TEXT, json_part
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.rows import ShardInput
from dspark_batch.batch.schema import result_columns, row_schema
from dspark_batch.batch.worker import BatchWorker
from dspark_batch.core import ErrorCode, FinishReason, Request, Result, RowError
from dspark_batch.testing.engine_factories import EchoingEngine

STRING, INTEGER, NUMBER, BOOLEAN = pa.string(), pa.int64(), pa.float64(), pa.bool_()
ANY_OBJECT = {"type": "object"}
NODE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "below": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
}


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string", "format": "date"}, STRING),
        ({"type": "integer"}, INTEGER),
        ({"type": "number"}, NUMBER),
        ({"type": "boolean"}, BOOLEAN),
        ({"enum": ["b", "a", None]}, STRING),
        ({"enum": [1, 2]}, INTEGER),
        ({"enum": [1, 2.5]}, NUMBER),
        ({"const": False}, BOOLEAN),
        ({"type": "number", "enum": [1, 2]}, NUMBER),
        ({"type": ["null", "integer"]}, INTEGER),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, NUMBER),
        ({"oneOf": [{"const": None}, {"const": "a"}, {"const": "b"}]}, STRING),
        ({"type": "array", "items": {"type": ["boolean", "null"]}}, pa.list_(BOOLEAN)),
        (
            object_of(z={"type": "integer"}, a={"type": "array", "items": object_of(b={"type": "string"})}),
            pa.struct([("z", INTEGER), ("a", pa.list_(pa.struct([("b", STRING)])))]),
        ),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}, "title": "t"}, INTEGER),
        ({"allOf": [{"$ref": "#/definitions/n"}], "definitions": {"n": {"type": "number"}}, "default": 1}, NUMBER),
        ({"anyOf": [{"$ref": "#/$defs/s"}, {"type": "null"}], "$defs": {"s": {"enum": ["x"]}}}, STRING),
        (
            {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
            pa.struct([("name", STRING), ("below", pa.list_(STRING))]),
        ),
        (object_of(again={"$ref": "#"}, n={"type": "integer"}), pa.struct([("again", STRING), ("n", INTEGER)])),
    ],
)
def test_a_schema_has_the_arrow_type_of_its_values(schema: dict[str, Any], kind: pa.DataType) -> None:
    assert json_part(schema).type == kind


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "null"},
        {"type": ["string", "integer"]},
        {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        {"anyOf": [{"type": "string"}, ANY_OBJECT]},
        {"enum": ["a", 1]},
        {"const": None},
        {"const": {"a": 1}},
        ANY_OBJECT,
        object_of(),
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {**object_of(a={"type": "integer"}), "additionalProperties": True},
        {**object_of(a={"type": "integer"}), "patternProperties": {"^b": {"type": "string"}}},
        {**object_of(a={"type": "integer"}), "anyOf": [{"required": ["b"]}]},
        {"properties": {"a": {"type": "integer"}}},
        object_of(a={"type": "integer"}, A={"type": "integer"}),
        {"type": "array"},
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "integer"}},
        {"allOf": [{"type": "integer"}, {"enum": ["a"]}]},
        {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.com/schema"},
    ],
)
def test_what_has_no_plain_type_is_json_text(schema: dict[str, Any]) -> None:
    assert json_part(schema) == JSON_TEXT


Draw = Callable[[], tuple[object, object]]
"""A value of a schema, and what its column holds."""


def random_text(chance: random.Random) -> str:
    return "".join(chance.choices('ab"\\/\n\x00é€𝄞', k=chance.randrange(6)))


def random_value(chance: random.Random, depth: int) -> object:
    match chance.randrange(7 if depth else 5):
        case 0:
            return random_text(chance)
        case 1:
            return chance.randint(-(2**80), 2**80)
        case 2:
            return chance.uniform(-1e9, 1e9)
        case 3:
            return chance.random() < 0.5
        case 4:
            return None
        case 5:
            return [random_value(chance, depth - 1) for _ in range(chance.randrange(3))]
        case _:
            return {random_text(chance): random_value(chance, depth - 1) for _ in range(chance.randrange(3))}


def random_schema(chance: random.Random, depth: int) -> tuple[dict[str, Any], Draw]:
    def plain(draw: Callable[[], object]) -> Draw:
        def drawn() -> tuple[object, object]:
            value = draw()
            return value, value

        return drawn

    match chance.randrange(9 if depth else 6):
        case 0:
            return {"type": "string"}, plain(lambda: random_text(chance))
        case 1:
            return {"type": "integer"}, plain(lambda: chance.choice([0, 2**63 - 1, -(2**63), chance.randrange(999)]))
        case 2:
            return {"type": "number"}, plain(lambda: chance.choice([chance.gauss(0, 1e6), 3, 1e-300]))
        case 3:
            return {"type": "boolean"}, plain(lambda: chance.random() < 0.5)
        case 4:
            values = sorted({random_text(chance) for _ in range(3)})
            return {"enum": values}, plain(lambda: chance.choice(values))
        case 5:

            def free() -> tuple[object, object]:
                value = random_value(chance, 2)
                text = None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
                return value, text

            return {}, free
        case 6:
            below, draw = random_schema(chance, depth - 1)
            return {"anyOf": [below, {"type": "null"}]}, lambda: chance.choice([draw(), (None, None)])
        case 7:
            below, draw = random_schema(chance, depth - 1)

            def items() -> tuple[object, object]:
                drawn = [draw() for _ in range(chance.randrange(4))]
                return [value for value, _ in drawn], [held for _, held in drawn]

            return {"type": "array", "items": below}, items
        case _:
            fields = {f"{name} {place}": random_schema(chance, depth - 1) for place, name in enumerate("zya")}

            def entries() -> tuple[object, object]:
                drawn = {name: draw() for name, (_, draw) in fields.items() if chance.random() < 0.8}
                value = {name: value for name, (value, _) in drawn.items()}
                return value, {name: drawn[name][1] if name in drawn else None for name in fields}

            return {"type": "object", "properties": {name: below for name, (below, _) in fields.items()}}, entries


def extract_config(make_config, schema: dict[str, Any], **sections: Any):
    sampling = {"json_schema": schema, **sections.pop("sampling", {})}
    return make_config(task="extract", sampling=sampling, **sections)


def result_of(text: str, **values: Any) -> Result:
    return Result(**{"id": "a", "text": text, "finish_reason": FinishReason.STOP, "num_generated_tokens": 3, **values})


def table_of(config, results: list[Result]) -> pa.Table:
    schema = row_schema(config, input_schema=pa.schema([]))
    return pa.Table.from_arrays(result_columns(results, schema=schema), schema=schema.added)


@pytest.mark.parametrize("seed", range(40))
def test_values_of_random_schemas_come_back_from_the_column_and_from_parquet(make_config, seed: int) -> None:
    chance = random.Random(seed)
    schema, draw = random_schema(chance, 3)
    drawn = [draw() for _ in range(7)]
    results = [result_of(json.dumps(value, ensure_ascii=chance.random() < 0.5)) for value, _ in drawn]
    failed = Result.failed(Request(id="b", prompt="x"), RowError(code=ErrorCode.NULL_PROMPT, message="NULL"))
    table = table_of(extract_config(make_config, schema), [*results, failed])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    for held in (table, pq.read_table(pa.BufferReader(sink.getvalue()))):
        assert held["summary"].to_pylist() == [*(expected for _, expected in drawn), None]
        assert [row and row["code"] for row in held["error"].to_pylist()] == [None] * 7 + ["null_prompt"]


def value_of(make_config, schema: dict[str, Any], text: str, **values: Any) -> object:
    return table_of(extract_config(make_config, schema), [result_of(text, **values)])["summary"].to_pylist()[0]


def error_of(make_config, schema: dict[str, Any], text: str, **values: Any) -> dict[str, Any]:
    row = table_of(extract_config(make_config, schema), [result_of(text, **values)]).to_pylist()[0]
    assert (row["summary"], row["finish_reason"], row["num_generated_tokens"]) == (None, "error", 3)
    assert row["error"]["retryable"] is False
    assert text[:400] in row["error"]["message"]
    return row["error"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n":1,"n":2,"other":3}', {"n": 2, "free": None}),
        ('{"free":{"a":1,"a":[1.50,"é"]}}', {"n": None, "free": '{"a":[1.5,"é"]}'}),
        ('{"free":"text"}', {"n": None, "free": '"text"'}),
        ('{"free":"\\ud83d\\ude00 \\ud83d"}', {"n": None, "free": '"😀 \ufffd"'}),
        ("null", None),
    ],
)
def test_the_last_of_equal_keys_counts_and_every_text_is_unicode(make_config, text: str, expected: object) -> None:
    assert value_of(make_config, object_of(n={"type": "integer"}, free={}), text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"n":[1,{2**63}]}}', f"n: {2**63} is beyond an integer of 64 bits"),
        ('{"x":1e999}', "1e999 is beyond a number of 64 bits"),
        (f'{{"x":{10**400}}}', "is beyond a number of 64 bits"),
        ('{"x":NaN}', "NaN is not JSON"),
        ('{"free":-Infinity}', "-Infinity is not JSON"),
        ('{"n":["1"]}', 'n: "1" is not an integer'),
        ('{"n":[true]}', "n: true is not an integer"),
        ('{"n":{}}', "n: {} is not an array"),
        ("[]", "[] is not an object"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_value_that_the_column_cannot_hold_fails_its_row(make_config, text: str, said: str) -> None:
    schema = object_of(n={"type": "array", "items": {"type": "integer"}}, x={"type": "number"}, free={})
    error = error_of(make_config, schema, text)
    assert error["code"] == "invalid_json"
    assert said in error["message"]


@pytest.mark.parametrize(
    ("reason", "max_new_tokens", "said"),
    [
        (FinishReason.LENGTH, 3, "after 3 tokens, before its JSON was whole, by sampling.max_new_tokens; raise it"),
        (FinishReason.LENGTH, 9, "as the context was full; raise engine.max_context"),
        (FinishReason.STOP, 9, "by sampling.stop or sampling.stop_token_ids"),
    ],
)
def test_a_cut_text_names_the_setting_that_cut_it(make_config, reason, max_new_tokens: int, said: str) -> None:
    config = extract_config(make_config, object_of(a={}), sampling={"max_new_tokens": max_new_tokens})
    row = table_of(config, [result_of('{"a":"b', finish_reason=reason)]).to_pylist()[0]
    assert row["error"]["code"] == "incomplete_json"
    assert said in row["error"]["message"]
    assert row["error"]["message"].endswith('{"a":"b')


def test_a_number_at_the_limit_may_lack_digits_and_what_has_an_end_is_whole(make_config) -> None:
    cut = {"finish_reason": FinishReason.LENGTH}
    assert error_of(make_config, {"type": "integer"}, "12", **cut)["code"] == "incomplete_json"
    assert value_of(make_config, {"type": "integer"}, "12") == 12
    assert value_of(make_config, {"type": "array", "items": {"type": "integer"}}, "[12]", **cut) == [12]


def only_shard(config, texts: list[str | None]) -> ShardResult:
    table = pa.table({"text": pa.array(texts, pa.string())})
    worker = BatchWorker(EchoingEngine(), config=config, input_schema=table.schema)
    shard = ShardInput(key="s", table=table, ids=tuple(f"r{row}" for row in range(len(texts))))
    (result,) = worker.run_shards([shard])
    assert result.table.schema == worker.output_schema
    return result


def test_rows_fail_alone_and_count_as_failed_copies_too(make_config) -> None:
    config = extract_config(
        make_config,
        object_of(n={"type": "integer"}),
        prompt={"template": "{{ text }}"},
        sampling={"max_new_tokens": 10},
        output={"token_ids": True},
    )
    result = only_shard(config, ['{"n":1}', '{"n":12345678}', None, '{"n":12345678}', '{"n":1}', '{"n":"a"}'])
    rows = result.table.to_pylist()
    assert [row["summary"] for row in rows] == [{"n": 1}, None, None, None, {"n": 1}, None]
    codes = [row["error"] and row["error"]["code"] for row in rows]
    assert codes == [None, "incomplete_json", "null_prompt", "incomplete_json", None, "invalid_json"]
    assert rows[1]["token_ids"] is None
    assert rows[1]["num_generated_tokens"] == 10
    stats = result.stats
    assert (stats.num_failed_rows, stats.num_retryable_rows, stats.num_copied_rows) == (4, 0, 2)
    assert stats.num_failed_by_code == {"incomplete_json": 2, "invalid_json": 1, "null_prompt": 1}
    assert result.table["summary"].null_count == 4


def test_a_row_of_several_samples_fails_with_any_of_them_and_keeps_the_others(make_config) -> None:
    config = extract_config(
        make_config,
        object_of(n={"type": "integer"}),
        prompt={"template": "{{ text }}"},
        sampling={"n": 2, "temperature": 1.0},
    )
    result = only_shard(config, ['{"n":1}\n{"n":2}', '{"n":3}\n{"n":'])
    assert result.table["summary"].to_pylist() == [{"n": 1}, {"n": 2}, {"n": 3}, None]
    assert (result.stats.num_rows, result.stats.num_output_rows, result.stats.num_failed_rows) == (2, 4, 1)
