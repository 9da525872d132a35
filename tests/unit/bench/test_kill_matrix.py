"""Plans, audits and reports of the kill matrix; no Ray is started."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_batch.bench.kill_matrix import (
    append_record,
    main,
    phase_table,
    problem_lines,
    read_records,
    report,
    summary_table,
)
from dspark_batch.testing.kill_job import NUM_SHARDS, Audit, KillJob, compare_rows, make_kill_job
from dspark_batch.testing.kill_runs import CELLS, KillRecord, plan_run
from dspark_batch.testing.pipeline import start_run

CLEAN = Audit(num_rows=36, num_lost=0, num_duplicated=0, num_changed=0, num_stray_files=2, num_strays_counted=0)


def record_of(run: int, **changes: object) -> KillRecord:
    plan = plan_run(run, seed=1)
    record = KillRecord(
        plan=plan,
        phase="working",
        num_commits_at_kill=4,
        exit_codes=(-9, 0),
        last_words=("", "done: 36 rows"),
        num_restarts=1,
        elapsed_s=9.5,
        audit=CLEAN,
        problem=None,
    )
    return replace(record, **changes)


def test_every_round_of_plans_goes_through_all_cells_and_is_the_same_each_time() -> None:
    assert len(CELLS) == 18
    for start in (0, 18, 180):
        plans = [plan_run(run, seed=5) for run in range(start, start + 18)]
        assert {(plan.target, plan.signal, plan.sink) for plan in plans} == set(CELLS)
        assert plans == [plan_run(run, seed=5) for run in range(start, start + 18)]
        assert plans != [plan_run(run, seed=6) for run in range(start, start + 18)]


def test_plans_strike_early_late_and_in_between() -> None:
    moments = [plan_run(run, seed=2).num_commits for run in range(400)]
    assert 40 < moments.count(None) < 130
    counts = [moment for moment in moments if moment is not None]
    assert set(counts) == set(range(1, NUM_SHARDS + 1))


def test_the_comparison_counts_lost_doubled_and_changed_rows() -> None:
    rng = random.Random(4)
    expected = [{"id": f"r{n}", "answer": f"a{n}", "num_rounds": n} for n in range(30)]
    shuffled = rng.sample(expected, 30)
    assert compare_rows(expected, shuffled) == replace(CLEAN, num_rows=30, num_stray_files=0)
    found = [
        *shuffled[3:],
        shuffled[5],
        {**shuffled[6], "answer": "other"},
        {"id": "new", "answer": "", "num_rounds": 0},
    ]
    audit = compare_rows(expected, found)
    assert (audit.num_rows, audit.num_lost, audit.num_duplicated, audit.num_changed) == (30, 3, 3, 1)
    assert not audit.is_clean
    moved = [{**row, "num_rounds": 0} for row in expected]
    assert compare_rows(expected, moved).num_changed == 29
    assert compare_rows(expected, moved, ignored=("num_rounds",)).is_clean


@pytest.mark.parametrize("sink", ["parquet", "delta", "iceberg"])
def test_the_audit_sees_what_a_reader_of_the_table_sees(tmp_path: Path, sink) -> None:
    if sink != "parquet":
        pytest.importorskip("deltalake" if sink == "delta" else "pyiceberg")
    job = make_kill_job(tmp_path / "job", sink=sink, engine="scripted", address="none")
    config = job.output.config(
        input={"path": str(job.folder / "in" / "rows.parquet")}, shards={"rows": 3}, engine={"backend": "local"}
    )
    start_run(config)
    expected = job.output.read()
    assert job.audit(expected).is_clean
    assert (job.num_commits, job.is_complete) == (NUM_SHARDS, True)
    stray(job, sink)
    audit = job.audit(expected)
    assert (audit.num_stray_files, audit.num_strays_counted) == (1, int(sink == "parquet"))
    assert audit.is_clean == (sink != "parquet")


def stray(job: KillJob, sink: str) -> None:
    """A data file that no manifest entry names, where a run keeps its own."""
    import pyarrow.parquet as pq

    file = next(path for path in job.out.rglob("part-00003-*.parquet"))
    pq.write_table(pq.read_table(file), file.with_name("part-00099-01234567.parquet"))


def test_records_survive_the_file_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    assert read_records(path) == []
    records = [record_of(0), record_of(1, audit=None, problem="waited in vain")]
    for record in records:
        append_record(path, record)
    with path.open("a") as file:
        file.write('{"plan": {"run": 3')
    assert read_records(path) == records


def test_the_report_counts_by_cell_and_names_what_went_wrong() -> None:
    records = [record_of(run) for run in range(36)]
    text = report(records)
    assert "36 runs" in text
    assert "No row was lost" in text
    lines = summary_table(records).splitlines()
    assert len(lines) == 2 + 18 + 1
    assert lines[-1] == "| all |  |  |  | 36 | 36 | 36 | 0 | 0 | 0 | 0 | 72 | 0 |"
    assert "| scripted | actor | SIGKILL | delta | 2 | 2 | 2 | 0 |" in summary_table(records)
    bad = [
        *records,
        record_of(40, audit=replace(CLEAN, num_lost=2)),
        record_of(41, phase="ended", audit=None, problem="x"),
    ]
    assert len(problem_lines(bad)) == 2
    assert "num_lost=2" in report(bad)
    assert "No row was lost" not in report(bad)
    assert sum(int(line.split("|")[6]) for line in phase_table(bad).splitlines()[2:]) == 1


def test_a_file_with_runs_is_only_continued_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record_of(0))
    with pytest.raises(SystemExit):
        main(["--records", str(path), "--runs", "1", "--seed", "1"])
    assert "--resume" in capsys.readouterr().err
    assert main(["--records", str(path), "--runs", "1", "--seed", "1", "--resume"]) == 0
    assert "1 runs" in capsys.readouterr().out
