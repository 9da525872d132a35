from __future__ import annotations

import datetime
import operator
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.filters import parse_filter
from dspark_batch.batch.reader import ShardReader
from dspark_batch.batch.shards import make_plan
from dspark_batch.errors import ConfigError

TABLE = pa.table(
    {
        "n": [1, 2, 3, None],
        "x": [0.5, 1.5, None, 2.5],
        "s": ["a", "b", None, "d"],
        "b": [True, False, None, True],
        "day": pa.array([datetime.date(2026, 1, day) for day in (1, 2, 3, 4)]),
        "at": pa.array([datetime.datetime(2026, 1, day, tzinfo=datetime.UTC) for day in (1, 2, 3, 4)]),
        "tag": pa.array(["u", "v", "u", None]).dictionary_encode(),
        "odd name": [1, 0, 1, 0],
        "amount": pa.array([Decimal("9.99"), Decimal(10), None, Decimal("1e7")], pa.decimal128(10, 2)),
        "whole": pa.array([Decimal(1), Decimal(2), None, None], pa.decimal128(10, 0)),
        "price": ["9.90", "100", None, "free"],
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("n >= 2", [1, 2]),
        ("2 <= n", [1, 2]),
        ("n > 1.5", [1, 2]),
        ("1 < n < 3", [1]),
        ("n != 2", [0, 2]),
        ("x > 1", [1, 3]),
        ("x == 1.5 or s == 'a'", [0, 1]),
        ("s in ['a', 'd']", [0, 3]),
        ("s not in ('a', 'd')", [1]),
        ("s is None", [2]),
        ("s is not None and not b", [1]),
        ("b", [0, 3]),
        ("n > -1", [0, 1, 2]),
        ("day >= '2026-01-03'", [2, 3]),
        ("at < '2026-01-02T00:00:00Z'", [0]),
        ("tag == 'u'", [0, 2]),
        ("tag in ['v']", [1]),
        ("n > x", [0, 1]),
        ("column('odd name') == 1", [0, 2]),
        ("not s in ['a']", [1, 3]),
        ("not (s in ['a'] or n > 1)", []),
        ("not (s not in ['a'])", [0]),
        ("not (s in ['a'] and n > 1)", [0, 1, 3]),
        ("not 1 < n < 3", [0, 2]),
        ("not s is None", [0, 1, 3]),
        ("amount >= 10", [1, 3]),
        ("amount > 9.995", [1, 3]),
        ("10 > amount", [0]),
        ("amount in [10, 9.99, 1.005]", [0, 1]),
        ("not amount == 10", [0, 3]),
        ("whole > 1.5", [1]),
        ("whole <= 1.5", [0]),
        ("whole == 1.5", []),
        ("whole != 1.5", [0, 1]),
        ("whole < 1e30", [0, 1]),
        ("price >= 10", [1]),
        ("not price >= 10", [0]),
        ("price in [9.9, 100]", [0, 1]),
        ("price == '9.90'", [0]),
    ],
)
def test_filters_keep_the_rows_that_sql_would(text, rows):
    expression, _ = parse_filter(text, schema=TABLE.schema)
    numbered = TABLE.append_column("row", pa.array(range(4)))
    assert numbered.filter(expression)["row"].to_pylist() == rows


def test_the_columns_that_a_filter_reads_are_known():
    assert parse_filter("x > 1 and (s is None or n in [1])", schema=TABLE.schema)[1] == ("n", "s", "x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("n >", "invalid syntax"),
        ("", "invalid syntax"),
        ("nope == 1", "no column 'nope'; its columns are: n, x"),
        ("__import__('os').system('true')", "is not a column"),
        ("s.upper() == 'A'", "is not a column"),
        ("n + 1 == 2", "is not a column"),
        ("n == None", "is None"),
        ("n is 3", "followed by None"),
        ("n in 'abc'", "list of constants"),
        ("s > 1 and n", ""),
        ("x", "bool"),
        ("n == 'three'", "three"),
        ("-'a' == s", "before 'a'"),
        ("day > 'tomorrow'", "tomorrow"),
    ],
)
def test_anything_else_is_a_config_error_that_quotes_the_filter(text, reason):
    with pytest.raises(ConfigError) as caught:
        parse_filter(text, schema=TABLE.schema)
    (problem,) = caught.value.problems
    assert problem.field == "input.filter"
    assert repr(text) in problem.message
    assert reason in problem.message


Truth = bool | None
Row = dict[str, Any]
KINDS = {
    "n": pa.int64(),
    "s": pa.string(),
    "d": pa.decimal128(10, 2),
    "w": pa.decimal128(38, 0),
    "b": pa.bool_(),
}


def random_condition(rng: random.Random, depth: int = 0) -> tuple[str, Callable[[Row], Truth]]:
    """A filter's text, and what SQL says of a row: true, false, or None for unknown. Made side by side."""
    if depth < 3 and rng.random() < 0.5:
        (left, of_left), (right, of_right) = (random_condition(rng, depth + 1) for _ in range(2))
        word, ends = rng.choice([("and", False), ("or", True)])

        def joined(row: Row) -> Truth:
            values = [of_left(row), of_right(row)]
            return ends if ends in values else None if None in values else not ends

        return f"({left} {word} {right})", joined
    if rng.random() < 0.3:
        text, inner = random_condition(rng, depth + 1)

        def negated(row: Row) -> Truth:
            value = inner(row)
            return None if value is None else not value

        return f"not ({text})", negated
    name = rng.choice(list(KINDS))
    if name == "b":
        return "b", lambda row: row["b"]
    if rng.random() < 0.15:
        return f"{name} is None", lambda row: row[name] is None
    constants = {
        "n": ["3", "-1", "4"],
        "s": ["'a'", "'b'", "'zz'"],
        "d": ["1", "1.5", "1.505", "2", "-2.25", "123456789012.5"],
        "w": ["1", "1.5", "2", "-0.5", "1e40"],
    }[name]
    chosen = rng.sample(constants, 2)
    values = [text.strip("'") if name == "s" else Decimal(text) for text in chosen]
    if rng.random() < 0.4:
        is_negated = rng.random() < 0.5

        def within(row: Row) -> Truth:
            return None if row[name] is None else (row[name] in values) != is_negated

        return f"{name} {'not in' if is_negated else 'in'} [{', '.join(chosen)}]", within
    sign, compare = rng.choice(
        [
            ("==", operator.eq),
            ("!=", operator.ne),
            ("<", operator.lt),
            ("<=", operator.le),
            (">", operator.gt),
            (">=", operator.ge),
        ]
    )
    return f"{name} {sign} {chosen[0]}", lambda row: None if row[name] is None else compare(row[name], values[0])


def random_rows(rng: random.Random) -> list[Row]:
    values: dict[str, list[Any]] = {
        "n": [None, -1, 3, 4],
        "s": [None, "a", "b"],
        "d": [None, Decimal("1.50"), Decimal("1.51"), Decimal(2), Decimal("-2.25")],
        "w": [None, Decimal(1), Decimal(2), Decimal(0), Decimal(10) ** 37],
        "b": [None, True, False],
    }
    return [
        {"text": str(place)} | {name: rng.choice(values[name][: rng.randint(1, 5)]) for name in KINDS}
        for place in range(rng.randint(1, 12))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_a_filter_keeps_what_three_valued_logic_keeps_also_by_statistics(make_config, tmp_path: Path, seed: int):
    rng = random.Random(seed)
    text, passes = random_condition(rng)
    groups = [random_rows(rng) for _ in range(3)]
    schema = pa.schema([("text", pa.string()), *KINDS.items()])
    (tmp_path / "in").mkdir()
    with pq.ParquetWriter(tmp_path / "in" / "a.parquet", schema) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    config = make_config(input={"filter": text})
    plan = make_plan(config.input, max_rows=4)
    reader = ShardReader(config, plan_schema=plan.schema)
    kept = [row for shard in plan.shards for row in reader.read(shard).table.to_pylist()]
    reader.close()
    assert kept == [row for rows in groups for row in rows if passes(row)], text
