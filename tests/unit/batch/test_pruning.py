"""Row groups and files that a filter drops as a whole are not read, and nothing else changes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from dspark_batch.batch.filters import parse_filter
from dspark_batch.batch.pruning import Pruner
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import Plan, make_plan
from dspark_batch.job.config import JobConfig

MakeConfig = Callable[..., JobConfig]


def sorted_rows(num_rows: int, *, start: int = 0) -> pa.Table:
    rows = range(start, start + num_rows)
    return pa.table({"text": [f"row {row}" for row in rows], "n": list(rows), "unused": ["x" * 100] * num_rows})


def write(path: Path, table: pa.Table, *, group_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows)


class ReadGroups:
    """What is asked of Parquet files: (row groups, columns) per pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[list[int], list[str]]] = []
        inner = pq.ParquetFile.iter_batches

        def noting(file: Any, *, batch_size: int, row_groups: list[int], columns: list[str]) -> Any:
            self.passes.append((row_groups, columns))
            return inner(file, batch_size=batch_size, row_groups=row_groups, columns=columns)

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)

    @property
    def groups(self) -> list[int]:
        return sorted(group for groups, _ in self.passes for group in groups)


def read_all(config: JobConfig, plan: Plan) -> dict[str, str]:
    """Text by row id."""
    reader = ShardReader(config, plan_schema=plan.schema)
    read = [reader.read(shard) for shard in plan.shards]
    reader.close()
    found = [pair for part in read for pair in zip(part.ids, part.table["text"].to_pylist(), strict=True)]
    assert len(dict(found)) == len(found), "an id stands twice"
    return dict(found)


def test_only_row_groups_with_rows_that_may_pass_are_read_and_only_needed_columns(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "a.parquet", sorted_rows(100), group_rows=10)
    config = make_config(input={"filter": "n >= 42 and n < 57", "columns": ["text"]})
    plan = make_plan(config.input, max_rows=1000)
    read = ReadGroups(monkeypatch)
    assert read_all(config, plan) == {f"a.parquet#{n}": f"row {n}" for n in range(42, 57)}
    assert read.groups == [4, 5]
    assert {name for _, names in read.passes for name in names} == {"text", "n"}


def test_shards_and_files_without_a_row_that_may_pass_are_not_planned(make_config: MakeConfig, tmp_path: Path) -> None:
    for place in range(5):
        write(tmp_path / "in" / f"{place}.parquet", sorted_rows(40, start=100 * place), group_rows=10)
    whole = make_plan(make_config().input, max_rows=10)
    config = make_config(input={"filter": "n > 110 and n != 7 and n < 125"})
    plan = make_plan(config.input, max_rows=10)
    assert [(shard.relative, shard.row_start) for shard in plan.shards] == [("1.parquet", 10), ("1.parquet", 20)]
    assert {shard.name for shard in plan.shards} < {shard.name for shard in whole.shards}
    assert (plan.digest, plan.files) == (whole.digest, whole.files)
    assert set(read_all(config, plan)) == {f"1.parquet#{n}" for n in range(11, 25)}


def test_one_shard_stays_where_nothing_passes(make_config: MakeConfig, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", sorted_rows(40), group_rows=10)
    config = make_config(input={"filter": "n > 1000"})
    plan = make_plan(config.input, max_rows=10)
    assert len(plan.shards) == 1
    assert read_all(config, plan) == {}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_folders_that_the_filter_excludes_are_not_planned(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    for country in ("de", "fr", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / "in" / f"country={country}"
        folder.mkdir(parents=True)
        if kind == "parquet":
            pq.write_table(pa.table({"text": ["a", "b"]}), folder / "x.parquet")
        else:
            (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "ab"))
    config = make_config(input={"filter": "country == 'fr' and text != 'a'"})
    plan = make_plan(config.input, max_rows=10)
    assert [shard.relative.split("/")[0] for shard in plan.shards] == ["country=fr"]
    assert list(read_all(config, plan).values()) == ["b"]
    missing = make_config(input={"filter": "country is None"})
    assert len(make_plan(missing.input, max_rows=10).shards) == 1


def test_a_column_of_the_file_wins_over_one_of_the_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    write(tmp_path / "in" / "kind=a" / "x.parquet", pa.table({"text": ["t"], "kind": ["b"]}), group_rows=1)
    config = make_config(input={"filter": "kind == 'b'"})
    assert len(read_all(config, make_plan(config.input, max_rows=10))) == 1


def test_nan_passes_negated_conditions_although_statistics_do_not_show_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    table = pa.table({"text": ["a", "b", "c"], "x": [5.0, math.nan, 5.0]})
    write(tmp_path / "in" / "a.parquet", table, group_rows=3)
    for text in ("x != 5", "not x >= 1", "x not in [5.0]"):
        config = make_config(input={"filter": text})
        expected = table.filter(parse_filter(text, schema=table.schema)[0])["text"].to_pylist()
        assert list(read_all(config, make_plan(config.input, max_rows=10)).values()) == expected == ["b"]


def test_columns_that_a_file_lacks_or_has_in_another_type_prune_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    write(tmp_path / "in" / "a.parquet", pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), group_rows=1)
    write(tmp_path / "in" / "b.parquet", pa.table({"text": ["b"]}), group_rows=1)
    schema = pa.schema([("text", pa.string()), ("n", pa.int64())])
    pruner = Pruner("n > 5", schema=schema)
    local = fs.LocalFileSystem()
    assert [len(pruner.row_groups(local, str(tmp_path / "in" / f"{name}.parquet"))) for name in "ab"] == [1, 1]
    config = make_config(input={"filter": "n is None"})
    assert list(read_all(config, make_plan(config.input, max_rows=10)).values()) == ["b"]


def random_table(rng: random.Random, num_rows: int) -> pa.Table:
    def some(value: Any) -> Any:
        return None if rng.random() < 0.1 else value

    base = rng.randrange(50)
    return pa.table(
        {
            "text": pa.array([f"t{rng.random()}" for _ in range(num_rows)]),
            "n": pa.array([some(base + rng.randrange(10)) for _ in range(num_rows)], pa.int64()),
            "x": pa.array([some(rng.choice([math.nan, base + rng.random()])) for _ in range(num_rows)], pa.float64()),
            "s": pa.array([some(f"k{base + rng.randrange(5)}") for _ in range(num_rows)], pa.string()),
            "b": pa.array([some(base > 25) for _ in range(num_rows)], pa.bool_()),
        }
    )


def random_filter(rng: random.Random, depth: int = 0) -> str:
    if depth < 3 and rng.random() < 0.6:
        joined = f" {rng.choice(['and', 'or'])} ".join(random_filter(rng, depth + 1) for _ in range(2))
        return f"{rng.choice(['', '', 'not '])}({joined})"
    n = rng.randrange(60)
    return rng.choice(
        [
            f"n {rng.choice(['==', '!=', '<', '<=', '>', '>='])} {n}",
            f"x {rng.choice(['==', '!=', '<', '>='])} {n}.5",
            f"s {rng.choice(['==', '!=', '>'])} 'k{n}'",
            f"n in [{n}, {n + 1}]",
            f"s not in ['k{n}']",
            rng.choice(["b", "not b", "n is None", "x is not None", "n > x"]),
        ]
    )


@pytest.mark.parametrize("seed", range(40))
def test_what_is_read_is_what_a_filter_over_all_rows_keeps(make_config: MakeConfig, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    expected: dict[str, str] = {}
    text = random_filter(rng)
    for name in ("a", "b"):
        parts = [random_table(rng, rng.choice([1, 3, 8])) for _ in range(rng.randint(1, 6))]
        table = pa.concat_tables(parts)
        (tmp_path / "in").mkdir(exist_ok=True)
        with pq.ParquetWriter(tmp_path / "in" / f"{name}.parquet", table.schema) as writer:
            for part in parts:
                writer.write_table(part)
        numbered = table.append_column("row", pa.array(range(table.num_rows)))
        kept = numbered.filter(parse_filter(text, schema=table.schema)[0])
        expected |= {f"{name}.parquet#{row['row']}": row["text"] for row in kept.to_pylist()}
    config = make_config(input={"filter": text})
    plan = make_plan(config.input, max_rows=rng.choice([2, 5, 100]))
    assert read_all(config, plan) == expected
    shuffled = list(plan.shards)
    rng.shuffle(shuffled)
    reader = ShardReader(config, plan_schema=plan.schema)
    assert sorted(row_id for shard in shuffled for row_id in reader.read(shard).ids) == sorted(expected)
