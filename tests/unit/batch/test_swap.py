from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.finish import finish_run, is_complete
from dspark_batch.batch.results import ShardResult
from dspark_batch.batch.shards import Plan, Shard
from dspark_batch.batch.store import Store
from dspark_batch.batch.swap import finish_swap
from dspark_batch.errors import OutputError
from dspark_batch.testing.faulty_store import FaultyStore, SimulatedCrashError
from dspark_batch.testing.results import stats_of

OLD, NEW = {"sampling.seed": 0}, {"sampling.seed": 1}


def shard(index: int) -> Shard:
    name = f"part-{index:05d}-0000abcd"
    return Shard(name=name, format="parquet", path="p", relative="p", row_start=0, row_stop=2, num_rows=2)


def plan(*indices: int) -> Plan:
    return Plan(files=(), shards=tuple(shard(index) for index in indices), schema=pa.schema([]))


def result(index: int, mark: str) -> ShardResult:
    return ShardResult(key=shard(index).name, table=pa.table({"row": [f"{mark}{index}"] * 2}), stats=stats_of(2))


def old_output(path: Path, config) -> None:
    run = RunStore(str(path))
    run.open(OLD)
    run.write_meta("plan.json", "old")
    run.write_meta("ids/000001.parquet", "old")
    for index in (0, 1, 2):
        run.commit(result(index, "old"))
    finish_run(run, plan=plan(0, 1, 2), config=config)


def overwrite(path: Path, config, *, store: Store | None = None) -> None:
    """The new run has two of the old shards and one more."""
    run = RunStore(str(path), mode="overwrite", store=store)
    run.open(NEW)
    run.write_meta("plan.json", "new")
    for index in (0, 1, 7):
        run.commit(result(index, "new"))
    finish_run(run, plan=plan(0, 1, 7), config=config)


def rows(path: Path) -> list[str]:
    return read_output(str(path))["row"].to_pylist()[::2]


def test_the_old_output_stays_whole_until_the_new_one_takes_its_place(tmp_path, make_config):
    old_output(tmp_path, make_config())
    (tmp_path / "notes.txt").write_text("mine")
    run = RunStore(str(tmp_path), mode="overwrite")
    run.open(NEW)
    for index in (0, 1, 7):
        run.commit(result(index, "new"))
        assert rows(tmp_path) == ["old0", "old1", "old2"]
        assert (tmp_path / "_SUCCESS").exists()
    finish_run(run, plan=plan(0, 1, 7), config=make_config())
    assert rows(tmp_path) == ["new0", "new1", "new7"]
    shards = [f"{shard(index).name}.parquet" for index in (0, 1, 7)]
    assert sorted(os.listdir(tmp_path)) == ["_SUCCESS", "_dspark", "notes.txt", *shards]
    after = RunStore(str(tmp_path))
    after.open(NEW)
    after.check_integrity()
    assert after.read_meta("ids/000001.parquet") is None
    assert not after.store.files("_dspark/next", recursive=True)


def num_changes(folder: Path, config) -> int:
    old_output(folder, config)
    counting = FaultyStore(str(folder))
    overwrite(folder, config, store=counting)
    return counting.num_changes


def test_killed_at_any_change_the_output_is_the_old_or_the_new_and_the_same_command_ends_it(tmp_path, make_config):
    config = make_config()
    total = num_changes(tmp_path / "count", config)
    assert total > 30
    seen = set()
    for fail_at in range(1, total + 1):
        folder = tmp_path / str(fail_at)
        old_output(folder, config)
        with pytest.raises(SimulatedCrashError):
            overwrite(folder, config, store=FaultyStore(str(folder), fail_at=fail_at))
        before = tuple(rows(folder))
        assert before in {("old0", "old1", "old2"), ("new0", "new1", "new7")}
        seen.add(before)
        overwrite(folder, config) if before[0] == "old0" else finish_swap(Store(str(folder)))
        assert rows(folder) == ["new0", "new1", "new7"]
        after = RunStore(str(folder))
        after.open(NEW)
        after.sweep(min_age_s=0)
        after.check_integrity()
    assert len(seen) == 2


def test_an_interrupted_overwrite_goes_on_where_it_was(tmp_path, make_config):
    old_output(tmp_path, make_config())
    first = RunStore(str(tmp_path), mode="overwrite")
    first.open(NEW)
    kept = first.commit(result(0, "new"))
    again = RunStore(str(tmp_path), mode="overwrite")
    again.open(NEW)
    assert again.committed() == {kept.shard: kept}
    other = RunStore(str(tmp_path), mode="overwrite")
    other.open({"sampling.seed": 2})
    assert other.committed() == {}
    assert rows(tmp_path) == ["old0", "old1", "old2"]


def test_overwriting_an_empty_folder_is_a_first_run(tmp_path, make_config):
    overwrite(tmp_path, make_config())
    assert rows(tmp_path) == ["new0", "new1", "new7"]
    after = RunStore(str(tmp_path)).join("")
    assert is_complete(after, plan=plan(0))


def test_a_run_whose_files_vanished_is_not_finished(tmp_path, make_config):
    run = RunStore(str(tmp_path))
    run.open(OLD)
    run.commit(result(0, "x"))
    with pytest.raises(OutputError, match="1 shards were committed and are not any more, such as part-00001"):
        finish_run(run, plan=plan(0, 1), config=make_config())
    assert not (tmp_path / "_SUCCESS").exists()
