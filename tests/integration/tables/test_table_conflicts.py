"""Other writers on the same table, and commits whose answer got lost: rows still count once."""

from __future__ import annotations

import pytest

from dspark_batch.batch import delta, iceberg
from dspark_batch.errors import TransientStorageError
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.table_outputs import NUM_ROWS, TableOutput, rows_of

NUMBERS = list(range(NUM_ROWS))


def append_as_others(table: TableOutput) -> None:
    """Another writer appends the rows that the table has by now once more, in a transaction of its own."""
    config = table.config()
    if table.format == "delta":
        from deltalake import DeltaTable, write_deltalake

        rows = table._delta()
        write_deltalake(DeltaTable(config.output.path), rows.slice(0, 2), mode="append")
        return
    loaded = table._table()
    loaded.append(loaded.scan().to_arrow().slice(0, 2))


def conflict_error(table: TableOutput) -> Exception:
    if table.format == "delta":
        from deltalake.exceptions import CommitFailedError

        return CommitFailedError("another writer was faster")
    from pyiceberg.exceptions import CommitFailedException

    return CommitFailedException("another writer was faster")


def patch_commit(table: TableOutput, monkeypatch: pytest.MonkeyPatch, *, before=None, after=None) -> list[int]:
    """Call ``before`` and ``after`` around each commit to the table, with the number of the commit."""
    module = delta if table.format == "delta" else iceberg
    real = module._commit
    calls: list[int] = []

    def commit(*args, **rest):
        calls.append(len(calls))
        if before is not None:
            before(calls[-1])
        real(*args, **rest)
        if after is not None:
            after(calls[-1])

    monkeypatch.setattr(module, "_commit", commit)
    return calls


def numbers(table: TableOutput) -> list[int]:
    return sorted(row["n"] for row in table.read())


def test_a_commit_whose_answer_was_lost_is_not_made_twice(make_table, monkeypatch):
    table = make_table()

    def lose_the_answer(number: int) -> None:
        if number == 0:
            raise conflict_error(table)

    calls = patch_commit(table, monkeypatch, after=lose_the_answer)
    start_run(table.config())
    assert len(calls) == 1
    assert numbers(table) == NUMBERS


def test_a_commit_that_failed_is_tried_again(make_table, monkeypatch):
    table = make_table()

    def fail_twice(number: int) -> None:
        if number < 2:
            raise conflict_error(table)

    calls = patch_commit(table, monkeypatch, before=fail_twice)
    start_run(table.config())
    assert len(calls) == 3
    assert numbers(table) == NUMBERS


def test_conflicts_without_end_are_named_and_the_same_command_goes_on(make_table, monkeypatch):
    table = make_table()

    def fail(_: int) -> None:
        raise conflict_error(table)

    with monkeypatch.context() as patched:
        patch_commit(table, patched, before=fail)
        with pytest.raises(TransientStorageError, match="other writers changed the"):
            start_run(table.config())
    assert table.read() == []
    assert start_run(table.config()) == 0
    assert numbers(table) == NUMBERS


def test_rows_that_others_append_in_between_stay_beside_ours(make_table, monkeypatch):
    table = make_table()
    config = table.config(input={"incremental": "files"})
    start_run(config)
    table.write_input("b.parquet", rows_of(NUM_ROWS, 50))
    patch_commit(table, monkeypatch, before=lambda _: append_as_others(table))
    start_run(config)
    found = numbers(table)
    assert len(found) == 52
    assert set(found) == set(range(50))
    assert start_run(config) == 0
    assert len(numbers(table)) == 52
