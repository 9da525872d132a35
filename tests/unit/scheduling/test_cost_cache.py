"""Tables on disk: what is foreign or damaged is refused with its reason, and measured anew."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_batch.scheduling.cost_cache import CostKey, load_table, save_table
from dspark_batch.scheduling.cost_table import CostTable

KEY = CostKey(
    device="a CPU (2 usable)",
    threads=2,
    target="abc",
    dtype="bfloat16",
    drafter="suffix, 16 tokens",
    versions=("torch 2.13", "dspark-batch 0.1.0"),
)
TABLE = CostTable.from_function(lambda t, r, c: 0.01 + 0.001 * t, rows=(1, 4, 16))


def test_a_table_comes_back_under_its_key_and_no_other(tmp_path: Path) -> None:
    assert load_table(tmp_path, KEY, most_rows=16) is None
    save_table(tmp_path, KEY, TABLE)
    assert load_table(tmp_path, KEY, most_rows=16) == TABLE
    others = [
        replace(KEY, device="another"),
        replace(KEY, threads=1),
        replace(KEY, target="def"),
        replace(KEY, dtype="float32"),
        replace(KEY, drafter="none"),
        replace(KEY, versions=("torch 2.14", "dspark-batch 0.1.0")),
    ]
    assert all(load_table(tmp_path, other, most_rows=1) is None for other in others)


def test_a_table_for_fewer_rows_is_not_enough_unless_more_do_not_fit(tmp_path: Path) -> None:
    save_table(tmp_path, KEY, TABLE)
    assert load_table(tmp_path, KEY, most_rows=64) is None
    save_table(tmp_path, KEY, TABLE, is_all_that_fits=True)
    assert load_table(tmp_path, KEY, most_rows=64) == TABLE


def test_a_damaged_or_foreign_file_is_refused_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_table(tmp_path, KEY, TABLE)
    assert file is not None
    good = json.loads(file.read_text())
    slower = [[c, r, t, 2 * s] for c, r, t, s in good["table"]["steps"]]
    cases = [
        (file.read_text()[:-20], "cannot be read"),
        ("[]", "not a cost table"),
        (json.dumps({**good, "format": 99}), "not a cost table"),
        (json.dumps({**good, "key": {**good["key"], "device": "another"}}), "measured for"),
        (json.dumps({**good, "table": {"steps": [[1, 1, 1, -3.0]], "drafts": []}}), "damaged"),
        (json.dumps({**good, "table": {}}), "damaged"),
        (json.dumps({**good, "table": {**good["table"], "steps": slower}}), "checksum"),
    ]
    for text, reason in cases:
        file.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_table(tmp_path, KEY, most_rows=1) is None
        assert reason in caplog.text
        assert str(file) in caplog.text
    save_table(tmp_path, KEY, TABLE)
    assert load_table(tmp_path, KEY, most_rows=16) == TABLE


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert save_table(blocked / "costs", KEY, TABLE) is None


def test_nothing_but_the_table_is_left_in_the_folder(tmp_path: Path) -> None:
    file = save_table(tmp_path, KEY, TABLE)
    save_table(tmp_path, KEY, TABLE)
    assert list(tmp_path.iterdir()) == [file]
