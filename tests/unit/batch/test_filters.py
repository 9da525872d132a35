from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from dspark_batch.batch.filters import parse_filter
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
