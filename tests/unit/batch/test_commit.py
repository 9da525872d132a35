from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import ClassVar

import pyarrow as pa
import pytest

from dspark_batch.batch.commit import RunStore, parquet_bytes, read_output
from dspark_batch.batch.manifest import ManifestEntry
from dspark_batch.batch.results import ShardResult, ShardStats
from dspark_batch.batch.store import Store
from dspark_batch.errors import FingerprintMismatchError, LeaseLostError, OutputError, TransientStorageError
from dspark_batch.testing.faulty_store import FaultyStore, SimulatedCrashError

FIELDS = {"model.weights": "w", "sampling.seed": 0}
STATS = ShardStats(
    num_rows=3,
    num_output_rows=3,
    num_failed_rows=1,
    num_retryable_rows=1,
    num_copied_rows=0,
    num_prompt_tokens=9,
    num_generated_tokens=12,
    num_rounds=6,
    num_drafted_tokens=10,
    num_accepted_tokens=6,
    num_failed_by_code={"null_prompt": 1},
)


def result(index: int, *, mark: str = "") -> ShardResult:
    rows = [f"{index}.{row}{mark}" for row in range(3)]
    return ShardResult(key=f"part-{index:05d}-0000abcd", table=pa.table({"row": rows}), stats=STATS)


def opened(path, **rest) -> RunStore:
    run = RunStore(str(path), **rest)
    run.open(FIELDS, mode="resume")
    return run


def test_a_committed_shard_has_its_file_its_entry_and_nothing_staged(tmp_path):
    run = opened(tmp_path)
    entry = run.commit(result(0))
    assert run.committed() == {entry.shard: entry}
    assert (entry.stats, entry.file) == (STATS, "part-00000-0000abcd.parquet")
    assert entry.versions["pyarrow"] == pa.__version__
    assert ManifestEntry.from_json(entry.to_json(), source="x") == entry
    run.check_integrity()
    run.finish()
    assert sorted(os.listdir(tmp_path)) == ["_SUCCESS", "_dspark", "part-00000-0000abcd.parquet"]


def test_the_same_table_gives_the_same_bytes():
    assert parquet_bytes(result(1).table) == parquet_bytes(result(1).table)


@pytest.mark.parametrize("damage", ["missing", "shorter", "same size", "foreign fingerprint"])
def test_an_entry_without_its_right_file_does_not_count(tmp_path, damage):
    run = opened(tmp_path)
    kept, broken = run.commit(result(0)), run.commit(result(1))
    path = tmp_path / broken.file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign fingerprint":
        entry = replace(broken, fingerprint="other")
        (tmp_path / "_dspark/manifest" / f"{broken.shard}.json").write_text(entry.to_json())
    else:
        path.write_bytes(data[:-1] if damage == "shorter" else data[:-1] + b"?")
    assert list(run.committed()) == [kept.shard]
    assert run.entry(broken.shard) is None
    run.commit(result(1))
    assert run.committed() == {kept.shard: kept, broken.shard: run.entry(broken.shard)}
    run.check_integrity()


def test_files_are_read_again_only_where_size_or_time_changed_or_on_request(tmp_path):
    run = opened(tmp_path)
    entry = run.commit(result(0))
    path = tmp_path / entry.file
    copied = path.read_bytes()
    path.unlink()
    path.write_bytes(copied)
    os.utime(path, ns=(1, 1))
    assert list(run.committed()) == [entry.shard]
    path.write_bytes(copied[:-1] + b"?")
    assert run.committed() == {}
    path.write_bytes(copied)
    assert list(run.committed(verify_checksums=True)) == [entry.shard]


def test_an_untouched_file_is_not_read(tmp_path):
    class Counting(Store):
        names: ClassVar[list[str]] = []

        def _read(self, name: str) -> bytes:
            self.names.append(name)
            return super()._read(name)

    entry = opened(tmp_path).commit(result(0))
    run = opened(tmp_path, store=Counting(str(tmp_path)))
    assert run.committed() == {entry.shard: entry}
    assert run.entry(entry.shard) == entry
    assert entry.file not in Counting.names
    run.committed(verify_checksums=True)
    assert entry.file in Counting.names


def test_the_first_of_two_attempts_stands(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    entry = first.commit(result(0, mark=" first"))
    assert second.commit(result(0, mark=" second")) == entry
    assert read_output(str(tmp_path))["row"][0].as_py() == "0.0 first"


def test_a_retry_of_failed_rows_replaces_the_shard(tmp_path):
    run = opened(tmp_path)
    run.commit(result(0))
    run.commit(result(0, mark=" again"), replace=True)
    assert read_output(str(tmp_path))["row"][0].as_py() == "0.0 again"
    run.check_integrity()


def test_an_attempt_that_renames_between_anothers_rename_and_entry_ends_with_one_right_entry(tmp_path):
    class Overtaken(FaultyStore):
        """Another attempt renames its file over ours right after our first rename."""

        overtaken = False

        def _move(self, source: str, target: str) -> None:
            super()._move(source, target)
            if target.endswith(".parquet") and not self.overtaken:
                self.overtaken = True
                (tmp_path / target).write_bytes(parquet_bytes(result(0, mark=" other").table))

    run = opened(tmp_path, store=Overtaken(str(tmp_path)))
    entry = run.commit(result(0, mark=" ours"))
    assert run.committed() == {entry.shard: entry}
    assert read_output(str(tmp_path))["row"].to_pylist() == [f"0.{row} ours" for row in range(3)]


def test_what_the_first_claims_stands_for_all_and_a_run_that_was_taken_over_claims_nothing(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    assert first.claim_meta("engine.json", "one") == "one"
    assert second.claim_meta("engine.json", "two") == "one"
    assert first.read_meta("engine.json") == "one"
    first.check_integrity()
    lost = RunStore(str(tmp_path), ticket=replace(first.ticket, epoch=7))
    with pytest.raises(LeaseLostError):
        lost.claim_meta("other.json", "three")
    assert first.read_meta("other.json") is None


def test_another_fingerprint_is_refused_with_the_fields_that_differ(tmp_path):
    opened(tmp_path)
    with pytest.raises(FingerprintMismatchError) as caught:
        RunStore(str(tmp_path)).open({**FIELDS, "sampling.seed": 1, "new": None}, mode="resume")
    assert "sampling.seed: 0 there, 1 here" in str(caught.value)
    assert "model.weights" not in str(caught.value)


def test_mode_error_refuses_a_folder_with_a_run(tmp_path):
    RunStore(str(tmp_path), mode="error").open(FIELDS)
    with pytest.raises(OutputError, match="holds a run already"):
        RunStore(str(tmp_path), mode="error").open(FIELDS)


def test_a_folder_with_parquet_files_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"")
    with pytest.raises(OutputError, match=r"mine\.parquet"):
        opened(tmp_path)


def test_sweep_removes_old_strays_and_leaves_young_and_foreign_files(tmp_path):
    run = opened(tmp_path)
    entry = run.commit(result(0))
    staging = tmp_path / "_dspark" / "staging"
    for name in ("part-00007-0000abcd.parquet", "_dspark/staging/a.tmp", "_dspark/staging/b.tmp", "mine.parquet"):
        (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path / "part-00007-0000abcd.parquet", staging / "a.tmp", tmp_path / "mine.parquet"):
        os.utime(path, (1, 1))
    assert run.sweep() == ["_dspark/staging/a.tmp", "part-00007-0000abcd.parquet"]
    assert run.sweep(min_age_s=0) == ["_dspark/staging/b.tmp"]
    assert (tmp_path / "mine.parquet").exists()
    assert run.committed() == {entry.shard: entry}


def test_read_output_gives_committed_rows_only_in_shard_order(tmp_path):
    run = opened(tmp_path)
    for index in (2, 0, 1):
        run.commit(result(index))
    (tmp_path / "part-00009-0000abcd.parquet").write_bytes(parquet_bytes(result(9).table))
    expected = [f"{index}.{row}" for index in range(3) for row in range(3)]
    assert read_output(str(tmp_path))["row"].to_pylist() == expected
    with pytest.raises(OutputError, match="no committed shard"):
        read_output(str(tmp_path / "nowhere"))


def test_a_manifest_entry_that_is_not_one_is_named(tmp_path):
    run = opened(tmp_path)
    entry = run.commit(result(0))
    (tmp_path / "_dspark/manifest" / f"{entry.shard}.json").write_text(json.dumps({"stats": {}}))
    with pytest.raises(OutputError, match=rf"{entry.shard}\.json is not a manifest entry"):
        run.committed()


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_a_crash_at_any_change_leaves_a_shard_that_is_whole_or_absent(tmp_path, fail_at):
    """Staging, rename and entry of the fingerprint, then of the shard: the process dies at each of them."""
    store = FaultyStore(str(tmp_path), fail_at=fail_at)
    run = RunStore(str(tmp_path), store=store)
    finished = False
    try:
        run.open(FIELDS, mode="resume")
        run.commit(result(0))
        finished = True
    except SimulatedCrashError:
        pass
    assert finished == (fail_at > 6)
    after = opened(tmp_path)
    assert (result(0).key in after.committed()) == finished
    after.commit(result(0))
    after.sweep(min_age_s=0)
    after.check_integrity()
    assert read_output(str(tmp_path))["row"].to_pylist() == ["0.0", "0.1", "0.2"]


def test_faults_that_pass_are_retried(tmp_path):
    opened(tmp_path)
    store = FaultyStore(str(tmp_path), fail_at=1, error=TimeoutError("store is slow"), num_failures=3)
    run = RunStore(str(tmp_path), store=store).join(opened(tmp_path).commit(result(0)).fingerprint)
    run.commit(result(1))
    run.sweep(min_age_s=0)
    run.check_integrity()


@pytest.mark.parametrize(
    ("error", "kind", "tries"),
    [
        (TimeoutError("store is slow"), TransientStorageError, 4),
        (OSError("AWS Error SLOW_DOWN: please reduce your request rate"), TransientStorageError, 4),
        (OSError(28, "No space left on device"), OutputError, 1),
        (PermissionError(13, "Permission denied"), OutputError, 1),
    ],
)
def test_faults_that_stay_are_raised_with_path_and_reason(tmp_path, error, kind, tries):
    opened(tmp_path)
    store = FaultyStore(str(tmp_path), fail_at=1, error=error, num_failures=99)
    with pytest.raises(kind, match=r"cannot write .*part-00000") as caught:
        opened(tmp_path, store=store).commit(result(0))
    assert str(error) in str(caught.value)
    assert store.num_changes == tries
    assert opened(tmp_path).committed() == {}


def test_a_real_permission_error_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        opened(tmp_path / "file" / "out")
