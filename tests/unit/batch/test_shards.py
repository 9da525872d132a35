from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.cut import cut_groups
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import Plan, make_plan
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.job.config import InputSection


def write_ragged(path: Path, table: pa.Table, *, seed: int) -> None:
    """Row groups of random sizes, empty ones among them."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        while start < table.num_rows:
            size = rng.choice([0, 1, 3, 7, 11, 40])
            writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
            start += size


def numbered(num_rows: int, *, start: int = 0) -> pa.Table:
    rows = range(start, start + num_rows)
    return pa.table({"text": [f"row {row}" for row in rows], "n": list(rows)})


def write_lines(path: Path, rows: list[object], *, blank_every: int = 5, end: str = "\n") -> None:
    lines = []
    for place, row in enumerate(rows):
        lines.append(json.dumps(row))
        if place % blank_every == 0:
            lines.append(" \t")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + end)


@pytest.mark.parametrize("max_rows", [1, 5, 13, 1000])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_parquet_shards_hold_every_row_once_in_order_with_its_place(make_config, tmp_path, max_rows, seed):
    table = numbered(97)
    write_ragged(tmp_path / "in" / "b.parquet", table.slice(60), seed=seed)
    write_ragged(tmp_path / "in" / "a.parquet", table.slice(0, 60), seed=seed + 10)
    config = make_config()
    plan = make_plan(config.input, max_rows=max_rows)
    assert all(shard.num_rows <= max_rows for shard in plan.shards)
    reader = ShardReader(config, plan_schema=plan.schema)
    read = [reader.read(shard) for shard in plan.shards]
    assert pa.concat_tables([shard.table for shard in read]).equals(table)
    assert [i for shard in read for i in shard.ids] == [
        *(f"a.parquet#{row}" for row in range(60)),
        *(f"b.parquet#{row}" for row in range(37)),
    ]
    order = list(range(len(read)))
    random.Random(seed).shuffle(order)
    assert all(reader.read(plan.shards[place]).table.equals(read[place].table) for place in order)
    reader.close()


def test_cuts_are_even_and_keep_to_row_groups_that_end_nearby():
    assert list(cut_groups([4, 4, 4, 0, 3], max_rows=8)) == [(0, 8), (8, 15)]
    assert list(cut_groups([3, 20, 2], max_rows=8)) == [(0, 7), (7, 13), (13, 19), (19, 25)]
    assert list(cut_groups([1100], max_rows=1024)) == [(0, 550), (550, 1100)]
    assert list(cut_groups([1000, 100, 1000], max_rows=1024)) == [(0, 700), (700, 1400), (1400, 2100)]
    assert list(cut_groups([500, 520, 490, 510], max_rows=1024)) == [(0, 1020), (1020, 2020)]
    assert list(cut_groups([0, 0], max_rows=8)) == []
    assert list(cut_groups([], max_rows=8)) == []


@pytest.mark.parametrize("seed", range(20))
def test_cuts_cover_all_rows_without_slivers(seed):
    rng = random.Random(seed)
    groups = [rng.choice([0, 1, 3, 17, 40, 121]) for _ in range(rng.randrange(1, 30))]
    max_rows = rng.choice([1, 7, 32, 100])
    cuts = list(cut_groups(groups, max_rows=max_rows))
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts)][: len(cuts)]
    assert (cuts[-1][1] if cuts else 0) == sum(groups)
    sizes = [stop - start for start, stop in cuts]
    assert all(0 < size <= max_rows for size in sizes)
    assert min(sizes, default=max_rows) >= min(max_rows, sum(groups)) // 3


def test_plans_are_the_same_every_time_and_survive_json(tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(50), seed=1)
    section = InputSection(path=str(tmp_path / "in"))
    plan = make_plan(section, max_rows=7)
    assert make_plan(section, max_rows=7) == plan
    again = Plan.from_json(plan.to_json(), source="here")
    assert again == plan
    assert again.digest == plan.digest
    assert make_plan(section, max_rows=1000, saved=plan.to_json()) == plan
    assert len({shard.name for shard in plan.shards}) == len(plan.shards)
    assert plan.num_rows == 50


def test_row_ids_and_values_do_not_depend_on_the_cut(make_config, tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(50), seed=4)
    ids = []
    for max_rows in (3, 50):
        plan = make_plan(make_config().input, max_rows=max_rows)
        reader = ShardReader(make_config(), plan_schema=plan.schema)
        ids.append([i for shard in plan.shards for i in reader.read(shard).ids])
    assert ids[0] == ids[1]


@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
@pytest.mark.parametrize("max_rows", [1, 7, 100])
def test_jsonl_shards_hold_every_line_once(make_config, tmp_path, max_rows, end):
    rows = [{"text": f"größe {i}", "n": i, "tags": ["x"] * (i % 3), "at": "2026-01-01"} for i in range(23)]
    write_lines(tmp_path / "in" / "a.jsonl", rows, end=end)
    plan = make_plan(make_config().input, max_rows=max_rows)
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    read = [reader.read(shard) for shard in plan.shards]
    assert [row for shard in read for row in shard.table.to_pylist()] == rows
    assert [i for shard in read for i in shard.ids] == [f"a.jsonl#{i}" for i in range(23)]
    assert all(shard.table.schema == read[0].table.schema for shard in read)


def test_jsonl_columns_that_differ_between_shards_get_one_type(make_config, tmp_path):
    rows = [
        {"text": "a", "x": None},
        {"text": "b", "x": 1},
        {"text": "c", "x": 1.5},
        {"text": "d", "late": [{"k": "v"}]},
    ]
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    plan = make_plan(make_config().input, max_rows=1)
    assert plan.schema.field("x").type == pa.float64()
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    values = [reader.read(shard).table.to_pylist()[0] for shard in plan.shards]
    assert [value["x"] for value in values] == [None, 1.0, 1.5, None]
    assert [value["late"] for value in values] == [None, None, None, [{"k": "v"}]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', r"a\.jsonl.* row 1"),
        ('{"text": "a"}\n{"text": 3}\n', r"a\.jsonl.* row 1"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', "surrogate"),
        ('{"text": "a", "o": {}}\n', "o holds only empty objects"),
    ],
)
def test_bad_lines_are_named_before_anything_is_generated(tmp_path, text, reason):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=reason):
        make_plan(InputSection(path=str(tmp_path / "a.jsonl")), max_rows=2)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        (["12345678901234567890", "12345678901234567891"], 0),
        (["1.5", "9007199254740993"], 1),
        (["[1.5, 9007199254740993]"], 0),
        (['{"k": [{"id": 12345678901234567890}]}'], 0),
        (["9" * 400], 0),
    ],
)
def test_integers_of_lines_that_a_column_would_round_are_an_input_error(make_config, tmp_path, values, row):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(f'{{"text": "é", "id": {value}}}\n\n' for value in values))
    with pytest.raises(InputError, match=rf"row {row} .*column 'id'.*in quotes"):
        make_plan(make_config().input, max_rows=5)


def test_floating_point_numbers_and_64_bit_integers_of_lines_come_out_as_they_are(make_config, tmp_path):
    rows = [{"text": "t", "a": 9007199254740993, "b": 1.5, "c": 1e300}, {"text": "t", "a": -(2**63), "b": 2**60}]
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    plan = make_plan(make_config().input, max_rows=5)
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    (shard,) = plan.shards
    assert reader.read(shard).table.to_pylist() == [rows[0], rows[1] | {"c": None}]


def test_types_that_change_between_shards_of_lines_are_an_input_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"a\.jsonl.*do not fit"):
        make_plan(InputSection(path=str(tmp_path / "a.jsonl")), max_rows=1)


def test_an_unreadable_parquet_file_is_named_with_the_reason(make_config, tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(5), seed=1)
    (tmp_path / "in" / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as Parquet"):
        make_plan(make_config().input, max_rows=5)


def test_a_file_that_breaks_in_the_middle_is_named_when_its_shard_is_read(make_config, tmp_path):
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(numbered(5000), path, compression="zstd", use_dictionary=False)
    plan = make_plan(make_config().input, max_rows=1000)
    data, modified_ns = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    data[200 : len(data) // 2] = b"\xff" * (len(data) // 2 - 200)
    path.write_bytes(data)
    os.utime(path, ns=(modified_ns, modified_ns))
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        _ = [reader.read(shard) for shard in plan.shards]


def test_files_with_other_columns_are_filled_with_null_and_other_types_refused(make_config, tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(5), seed=1)
    write_ragged(tmp_path / "in" / "b.parquet", pa.table({"text": ["x"]}), seed=1)
    plan = make_plan(make_config().input, max_rows=100)
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    assert reader.read(plan.shards[-1]).table.to_pylist() == [{"text": "x", "n": None}]
    write_ragged(tmp_path / "in" / "c.parquet", pa.table({"text": [1.5]}), seed=1)
    with pytest.raises(InputError, match=r"c\.parquet: its columns do not fit"):
        make_plan(make_config().input, max_rows=100)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("lacking", ["a", "b"])
def test_a_column_that_is_never_null_in_one_file_is_null_where_another_lacks_it(make_config, tmp_path, kind, lacking):
    (tmp_path / "in").mkdir()
    schema = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("n", pa.int64(), nullable=False)])
    for name in ("a", "b"):
        table = pa.table({"text": ["x"], "n": [1]}, schema=schema)
        table = table.drop_columns(["n"]) if name == lacking else table
        path = str(tmp_path / "in" / f"{name}.{kind}")
        pq.write_table(table, path) if kind == "parquet" else feather.write_feather(table, path)
    config = make_config()
    plan = make_plan(config.input, max_rows=5)
    reader = ShardReader(config, plan_schema=plan.schema)
    for shard in plan.shards:
        table = reader.read(shard).table
        sink = io.BytesIO()
        pq.write_table(table, sink)
        assert pq.read_table(sink)["n"].to_pylist() == [None if shard.relative.startswith(lacking) else 1]


def test_changed_missing_and_added_files_are_named_with_what_to_do(tmp_path):
    for name in ("a", "b", "c"):
        write_ragged(tmp_path / "in" / f"{name}.parquet", numbered(5), seed=1)
    section = InputSection(path=str(tmp_path / "in"))
    saved = make_plan(section, max_rows=5).to_json()
    os.utime(tmp_path / "in" / "a.parquet", ns=(1, 1))
    (tmp_path / "in" / "b.parquet").unlink()
    write_ragged(tmp_path / "in" / "d.parquet", numbered(5), seed=1)
    with pytest.raises(InputError) as caught:
        make_plan(section, max_rows=5, saved=saved)
    text = str(caught.value)
    for part in ("missing: ", "b.parquet", "added: ", "d.parquet", "changed: ", "a.parquet", "output.mode=overwrite"):
        assert part in text
    assert "c.parquet" not in text


def test_a_saved_plan_that_is_broken_or_of_another_version_is_refused(tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(5), seed=1)
    section = InputSection(path=str(tmp_path / "in"))
    for text in ("{", '{"version": 99}', "[]"):
        with pytest.raises(InputError, match="the saved plan is not a plan"):
            make_plan(section, max_rows=5, saved=text)


def test_only_the_needed_columns_are_read_and_the_filter_keeps_row_numbers(make_config, tmp_path):
    table = numbered(30).append_column("unused", pa.array(["z"] * 30)).append_column("key", pa.array(range(100, 130)))
    write_ragged(tmp_path / "in" / "a.parquet", table, seed=2)
    config = make_config(input={"columns": ["key"], "filter": "n >= 10 and n < 13"})
    plan = make_plan(config.input, max_rows=12)
    reader = ShardReader(config, plan_schema=plan.schema)
    assert reader.schema.names == ["text", "n", "key"]
    read = [reader.read(shard) for shard in plan.shards]
    assert [i for shard in read for i in shard.ids] == ["a.parquet#10", "a.parquet#11", "a.parquet#12"]
    assert [row["key"] for shard in read for row in shard.table.to_pylist()] == [110, 111, 112]


def test_every_missing_column_is_listed_at_once(make_config, tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(3), seed=1)
    config = make_config(
        input={"id": "key", "columns": ["text", "gone"], "filter": "year > 1"}, prompt={"template": "{{ body }}"}
    )
    plan = make_plan(config.input, max_rows=3)
    with pytest.raises(ConfigError) as caught:
        ShardReader(config, plan_schema=plan.schema)
    assert [problem.field for problem in caught.value.problems] == [
        "input.columns",
        "input.id",
        "prompt",
        "input.filter",
    ]


def test_an_empty_table_gives_a_plan_without_shards(tmp_path):
    write_ragged(tmp_path / "in" / "a.parquet", numbered(0), seed=1)
    (tmp_path / "in" / "b.parquet").write_bytes((tmp_path / "in" / "a.parquet").read_bytes())
    plan = make_plan(InputSection(path=str(tmp_path / "in")), max_rows=5)
    assert plan.shards == ()
    assert plan.schema.names == ["text", "n"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_that_is_rewritten_after_it_was_planned_is_refused_also_at_the_same_size(make_config, tmp_path, kind):
    path = tmp_path / "in" / f"a.{kind}"

    def put(start: int) -> None:
        if kind == "jsonl":
            write_lines(path, [{"text": f"row {row}"} for row in range(start, start + 8)])
        else:
            write_ragged(path, numbered(8, start=start), seed=1)

    put(1)
    plan = make_plan(make_config().input, max_rows=5)
    reader = ShardReader(make_config(), plan_schema=plan.schema)
    reader.read(plan.shards[0])
    size_bytes = path.stat().st_size
    put(2)
    assert path.stat().st_size == size_bytes
    with pytest.raises(InputError, match=rf"a\.{kind} is not the file that this run planned \({size_bytes} bytes"):
        reader.read(plan.shards[1])
    path.unlink()
    with pytest.raises(InputError, match="gone now"):
        reader.read(plan.shards[0])
    reader.close()
