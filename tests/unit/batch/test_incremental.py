"""Nightly runs into one output: each start does what has come since, and only that."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark_batch.batch.commit import RunStore, read_output
from dspark_batch.batch.fingerprint import fingerprint_fields
from dspark_batch.batch.planning import ResolvedPlan, resolve_plan
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

    plan = resolved(config).plan
    assert (plan.num_rows, plan.increment, len(plan.shards)) == (2, 2, 1)
    assert resolved(config, retry_failed=True).plan.num_rows == 50


def resolved(config, *, save: bool = False, **rest) -> ResolvedPlan:
    """What a start plans. With ``save`` it gets as far as writing that down, and no further."""

    def fields_of(digest: str | None) -> dict[str, object]:
        return fingerprint_fields(config, weights_fingerprint="scripted", input_digest=digest)

    run = RunStore(config.output.path, mode=config.output.mode)
    found = resolve_plan(config, run=run, fields_of=fields_of, **rest)
    if save:
        run.open(found.fields, anew=found.begins_anew)
        found.save(run)
    return found


def test_planned_rows_of_a_file_that_was_rewritten_are_taken_from_it_as_it_is_now(make_config, tmp_path):
    config = config_of(make_config, "rows")
    write(tmp_path / "in", "a.parquet", [1, 2, 3])
    resolved(config, save=True)
    write(tmp_path / "in", "a.parquet", [0, 1, 2, 3, 4])
    start_run(config)
    assert numbers(config) == [0, 1, 2, 3, 4]
    write(tmp_path / "in", "b.parquet", [3, 5])
    start_run(config)
    assert numbers(config) == [0, 1, 2, 3, 4, 5]


def test_planned_rows_of_a_file_that_is_gone_are_taken_from_wherever_they_stand(make_config, tmp_path):
    config = config_of(make_config, "rows")
    write(tmp_path / "in", "0.parquet", list(range(10, 17)))
    start_run(config)
    write(tmp_path / "in", "a.parquet", [1, 2, 3])
    write(tmp_path / "in", "b.parquet", [2, 4, 10])
    resolved(config, save=True)
    (tmp_path / "in" / "a.parquet").rename(tmp_path / "a.parquet")
    start_run(config)
    assert numbers(config) == [2, 4, *range(10, 17)]
    (tmp_path / "a.parquet").rename(tmp_path / "in" / "a.parquet")
    start_run(config)
    assert numbers(config) == [1, 2, 3, 4, *range(10, 17)]


def test_a_file_that_changed_in_an_unfinished_overwrite_begins_it_anew(make_config, tmp_path):
    config = config_of(make_config, "files", output={"mode": "overwrite"})
    write(tmp_path / "in", "a.parquet", list(range(12)))
    with pytest.raises(SimulatedCrashError):
        start_run(config, store=FaultyStore(config.output.path, fail_at=13))
    assert list((tmp_path / "out" / "_dspark" / "next" / "manifest").iterdir())
    write(tmp_path / "in", "a.parquet", list(range(12)), mark=" anew")
    assert start_run(config) == 3
    assert all(text.endswith("anew") for text in read_output(config.output.path)["text"].to_pylist())


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


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_while_files_are_rewritten_no_id_is_lost_or_doubled(make_config, tmp_path, seed):
    rng = random.Random(seed)
    config = config_of(make_config, "rows")
    for night in range(6):
        for name in rng.sample("abcd", 2):
            write(tmp_path / "in", f"{name}.parquet", rng.sample(range(40), rng.randrange(1, 14)), mark=f" {night}")
        if night and rng.random() < 0.3:
            rng.choice(list((tmp_path / "in").iterdir())).unlink()
            write(tmp_path / "in", "e.parquet", rng.sample(range(40), 3))
        for _ in range(rng.randrange(0, 3)):
            store = FaultyStore(config.output.path, fail_at=rng.randrange(1, 25))
            try:
                start_run(config, store=store)
            except SimulatedCrashError:
                continue
    start_run(config)
    found = numbers(config)
    wanted = {n for file in (tmp_path / "in").iterdir() for n in pq.read_table(file)["n"].to_pylist()}
    assert len(set(found)) == len(found)
    assert wanted <= set(found)
    assert start_run(config) == 0
