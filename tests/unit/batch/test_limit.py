"""``input.limit``: the first rows of the input, whatever its format and the cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dspark_batch.batch.cut import cut_groups
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import make_plan

ROWS = [{"text": f"two\nlines {n}", "n": n} for n in range(12)]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path, row_group_size=2)
        case ".arrow":
            feather.write_feather(table, str(path), chunksize=2)
        case ".csv":
            path.write_text("text,n\n\n" + "".join(f'"{row["text"]}",{row["n"]}\n\n' for row in rows))
        case _:
            data = "".join(f"\n{json.dumps(row)}\n" for row in rows).encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read(config, *, max_rows: int) -> tuple[list[dict[str, object]], list[str]]:
    plan = make_plan(config.input, max_rows=max_rows)
    assert all(shard.num_rows <= max_rows for shard in plan.shards)
    reader = ShardReader(config, plan_schema=plan.schema)
    read = [reader.read(shard) for shard in plan.shards]
    reader.close()
    return [row for part in read for row in part.table.to_pylist()], [i for part in read for i in part.ids]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("max_rows", [3, 100])
def test_the_first_rows_are_taken_across_files(make_config, tmp_path, kind, max_rows):
    write(tmp_path / "in" / f"a.{kind}", ROWS[:5])
    write(tmp_path / "in" / f"b.{kind}", ROWS[5:])
    whole, ids = read(make_config(), max_rows=max_rows)
    assert whole == ROWS
    for limit in (1, 3, 4, 5, 6, 11, 12, 99):
        found = read(make_config(input={"limit": limit}), max_rows=max_rows)
        assert found == (ROWS[:limit], ids[:limit])


def test_the_filter_drops_some_of_the_first_rows(make_config, tmp_path):
    write(tmp_path / "in" / "a.parquet", ROWS)
    config = make_config(input={"limit": 5, "filter": "n >= 3"})
    assert read(config, max_rows=2)[0] == ROWS[3:5]


def test_what_follows_the_first_rows_is_not_looked_at(make_config, tmp_path):
    write(tmp_path / "in" / "a.jsonl", ROWS)
    with (tmp_path / "in" / "a.jsonl").open("a") as file:
        file.write("no JSON\n")
    (tmp_path / "in" / "b.jsonl").write_text("nor here\n")
    assert read(make_config(input={"limit": 12}), max_rows=5)[0] == ROWS


def test_the_last_shard_keeps_to_the_limit_and_not_to_the_end_of_a_row_group():
    assert list(cut_groups([10, 10], max_rows=100, limit=11)) == [(0, 11)]
    assert list(cut_groups([10, 10], max_rows=8, limit=13)) == [(0, 7), (7, 13)]


def test_an_incremental_run_has_no_limit(make_config):
    with pytest.raises(ValidationError, match=r"input\.limit cannot be set with input\.incremental"):
        make_config(input={"limit": 5, "incremental": "files"})
