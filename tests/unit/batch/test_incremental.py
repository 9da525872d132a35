"""Nightly runs into one output: each start does what has come since, and only that."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.planning import resolve_plan
from dspark_batch.errors import InputError
from dspark_batch.testing.faulty_store import FaultyStore, SimulatedCrashError
from dspark_batch.testing.pipeline import start_run
from dspark_batch.testing.scripted_engine import ScriptedEngine


def write(folder: Path, name: str, numbers: list[int], *, mark: str = "") -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": [f"r{n}" for n in numbers], "text": [f"t{n}{mark}" for n in numbers], "n": numbers})
    pq.write_table(table, folder / name, row_group_size=4)


def config_of(make_config, how: str, **sections):
    section = {"id": "id", "incremental": how, **sections.pop("input", {})}
    return make_config(input=section, shards={"rows": 5}, **sections)


def numbers(config) -> list[int]:
    return sorted(read_output(config.output.path)["n"].to_pylist())


def test_new_files_are_done_once_and_old_ones_not_again(make_config, tmp_path):
    config = config_of(make_config, "files")
    write(tmp_path / "in", "a.parquet", list(range(12)))
    assert start_run(config) == 3
    assert start_run(config) == 0
    write(tmp_path / "in", "b.parquet", list(range(12, 20)))
    engine = ScriptedEngine()
    assert start_run(config, engine=engine) == 2
    assert engine.counters.num_requests == 8
    (tmp_path / "in" / "a.parquet").unlink()
    assert start_run(config) == 0
    assert numbers(config) == list(range(20))


def test_a_file_that_changed_is_refused_when_files_count(make_config, tmp_path):
    config = config_of(make_config, "files")
    write(tmp_path / "in", "a.parquet", [1, 2])
    start_run(config)
    write(tmp_path / "in", "a.parquet", [1, 2, 3])
    with pytest.raises(InputError, match=r"a\.parquet\ninput\.incremental=files takes each file once"):
        start_run(config)


def test_rows_are_new_by_their_id_wherever_they_stand(make_config, tmp_path):
    config = config_of(make_config, "rows", input={"columns": ["n"]})
    write(tmp_path / "in", "a.parquet", [1, 2, 3])
    start_run(config)
    write(tmp_path / "in", "a.parquet", [1, 2, 3, 4], mark="!")
    write(tmp_path / "in", "b.parquet", [3, 5, 1, 6, 7, 8])
    engine = ScriptedEngine()
    start_run(config, engine=engine)
    assert engine.counters.num_requests == 5
    assert numbers(config) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert start_run(config) == 0
    write(tmp_path / "in", "c.parquet", [1, 2])
    assert start_run(config) == 0
    write(tmp_path / "in", "d.parquet", [9, 2])
    assert start_run(config) == 1
    assert numbers(config) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_rows_that_the_filter_drops_count_as_unseen(make_config, tmp_path):
    write(tmp_path / "in", "a.parquet", [1, 2, 3])
    config = config_of(make_config, "rows", input={"filter": "text != 't2'"})
    start_run(config)
    write(tmp_path / "in", "b.parquet", [2, 3], mark=" ready")
    start_run(config)
    assert numbers(config) == [1, 2, 3]


def test_limits_count_over_the_increment(make_config, tmp_path):
    config = config_of(make_config, "files")
    write(tmp_path / "in", "a.parquet", list(range(50)))
    start_run(config)
    write(tmp_path / "in", "b.parquet", [100, 101])

    from dspark_batch.batch.commit import RunStore
    from dspark_batch.batch.fingerprint import fingerprint_fields

    def fields_of(digest: str | None) -> dict[str, object]:
        return fingerprint_fields(config, weights_fingerprint="scripted", input_digest=digest)

    plan = resolve_plan(config, run=RunStore(config.output.path), fields_of=fields_of).plan
    assert (plan.num_rows, plan.increment, len(plan.shards)) == (2, 2, 1)
    everything = resolve_plan(config, run=RunStore(config.output.path), fields_of=fields_of, retry_failed=True).plan
    assert everything.num_rows == 50


@pytest.mark.parametrize("how", ["files", "rows"])
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_over_many_nights_every_row_is_there_once(make_config, tmp_path, how, seed):
    rng = random.Random(seed)
    config = config_of(make_config, how)
    written: list[int] = []
    for night in range(5):
        fresh = list(range(100 * night, 100 * night + rng.randrange(1, 14)))
        again = rng.sample(written, min(3, len(written))) if how == "rows" else []
        write(tmp_path / "in", f"{night}.parquet", fresh + again)
        written += fresh
        for _ in range(rng.randrange(0, 3)):
            store = FaultyStore(config.output.path, fail_at=rng.randrange(1, 25))
            try:
                start_run(config, store=store)
            except SimulatedCrashError:
                continue
    start_run(config)
    assert numbers(config) == sorted(written)
    assert start_run(config) == 0
