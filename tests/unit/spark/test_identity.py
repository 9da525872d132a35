from __future__ import annotations

import datetime as dt
from decimal import Decimal

import pyarrow as pa
import pytest

from dspark_batch.batch.rows import row_ids
from dspark_batch.job.config import PromptSection
from dspark_batch.spark.identity import CONTENT_PREFIX, RowIdentity

PROMPT = PromptSection(template="Say {{ body }}")


def ids_of(table: pa.Table, *, id_column: str | None = None, prompt: PromptSection = PROMPT) -> list[str]:
    return RowIdentity(prompt, id_column=id_column, input_schema=table.schema).of(table)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, -7, 2**40]),
        pa.array(["a", "ü", ""]),
        pa.array([Decimal("1.50"), Decimal("-0.07"), Decimal("12345.00")]),
        pa.array([dt.date(2026, 1, 2), dt.date(1960, 1, 2), dt.date(2200, 12, 31)]),
        pa.array([1.5, 1e300, -0.0]),
        pa.array([True, False, True]),
        pa.array([dt.datetime(2026, 7, 1, 12, 0, 0, 5)] * 3, pa.timestamp("us")),
        pa.array([dt.datetime(2026, 7, 1, 12, 0, 0, 5)] * 3, pa.timestamp("us", tz="UTC")),
    ],
    ids=lambda values: str(values.type),
)
def test_an_id_columns_values_become_the_ids_that_files_have(values) -> None:
    table = pa.table({"key": values, "body": ["x", "y", "z"]})
    on_disk = row_ids(table, id_column="key", relative_file="f", row_index=range(3))
    assert ids_of(table, id_column="key") == list(on_disk)


def test_the_sessions_time_zone_does_not_change_an_id() -> None:
    moment = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC)
    ids = {
        ids_of(pa.table({"key": pa.array([moment], pa.timestamp("us", tz=zone)), "body": ["x"]}), id_column="key")[0]
        for zone in ("UTC", "Europe/Berlin", "Asia/Tokyo")
    }
    assert len(ids) == 1


def test_without_an_id_the_rendered_prompt_is_the_identity() -> None:
    ids = ids_of(pa.table({"body": ["a", "b", "a"], "other": [1, 2, 3]}))
    assert ids[0] == ids[2] != ids[1]
    assert all(row_id.startswith(CONTENT_PREFIX) for row_id in ids)
    renamed = PromptSection(template="Say {{ prompt }}")
    assert ids_of(pa.table({"prompt": ["a", "b", "a"]}), prompt=renamed) == ids


def test_a_null_id_falls_back_to_the_content_of_its_row_alone() -> None:
    table = pa.table({"key": ["k", None, None], "body": ["a", "b", "b"]})
    ids = ids_of(table, id_column="key")
    assert ids == ["k", *ids_of(table)[1:]]
    assert ids[1] == ids[2]


def test_ids_do_not_depend_on_how_the_table_is_cut() -> None:
    table = pa.table({"body": [f"row {row % 7}" for row in range(29)]})
    whole = ids_of(table)
    for size in (1, 3, 8, 29):
        assert [row_id for start in range(0, 29, size) for row_id in ids_of(table.slice(start, size))] == whole


def test_system_text_and_token_ids_are_part_of_the_content() -> None:
    table = pa.table({"body": ["a"], "ids": [[1, 23]], "ids2": [[12, 3]]})
    with_system = PromptSection(system="Be brief.", template="Say {{ body }}")
    one, other = PromptSection(token_ids="ids"), PromptSection(token_ids="ids2")
    assert len({ids_of(table, prompt=prompt)[0] for prompt in (PROMPT, with_system, one, other)}) == 4


def test_prompts_that_cannot_be_rendered_have_an_identity_too() -> None:
    assert len(ids_of(pa.table({"body": [None, None, "x"]}))) == 3


def test_conversations_are_identified_by_their_turns() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    values = [turns, turns[:1], [{**turns[0], "content": "ab"}], turns, None, turns[1:]]
    table = pa.table({"talk": values, "title": ["t"] * 5 + ["u"]})
    ids = ids_of(table, prompt=PromptSection(messages="talk"))
    assert ids[0] == ids[3]
    assert len(set(ids)) == 5
    assert ids != ids_of(table, prompt=PromptSection(messages="talk", system="{{ title }}"))
