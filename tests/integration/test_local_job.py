"""Whole runs through the command line with ``backend: local``: results, resume, bad input, exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dspark_batch
from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.batch.work import EngineWork
from dspark_batch.cli import run_cli
from dspark_batch.errors import ConfigError
from dspark_batch.job.outcome import ExitCode
from dspark_batch.report.records import read_run
from dspark_batch.testing.counting_engine import FACTORY as COUNTING
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.engine_factories import FAILURES_VARIABLE, FAULT_AFTER_VARIABLE, STEP_DELAY_VARIABLE
from dspark_batch.testing.jobs import Job

REFUSING = "dspark_batch.testing.engine_factories:refusing"
Capture = pytest.CaptureFixture[str]
JobOf = Callable[[pa.Table], Job]


def texts(values: list[str | None]) -> pa.Table:
    return pa.table({"id": [f"r{n}" for n in range(len(values))], "text": values})


def errors_of(job: Job) -> dict[str, str]:
    rows = read_output(str(job.out)).to_pylist()
    return {row["id"]: row["error"]["code"] for row in rows if row["error"] is not None}


def test_every_input_row_comes_out_once_with_its_columns_and_a_summary(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.OK
    table = read_output(str(job.out))
    assert table.column("id").to_pylist() == [f"r{n}" for n in range(47)]
    assert table.column("stars").to_pylist() == list(range(47))
    assert table.column("answer").null_count == 0
    assert (job.out / "_SUCCESS").exists()
    out, err = capsys.readouterr()
    assert "done: 47 rows in 8 shards" in out
    assert "accepted length 1.00" in out
    assert "% of them accepted" in out
    assert f"output: {job.out}" in out
    assert "  id=r0 | answer=" in out
    assert "rows 47/47 (100 %)" in err


def test_a_job_runs_from_python_and_its_rows_are_read_back(job: Job) -> None:
    outcome = dspark_batch.run_job(job.config, overrides=["output.column=said"])
    assert (outcome.is_success, outcome.code) == (True, ExitCode.OK)
    assert dspark_batch.read_output(job.out).column("said").null_count == 0
    with pytest.raises(ConfigError, match=r"config: sampling\.top_p: must lie in"):
        dspark_batch.run_job({**job.config, "sampling": {"top_p": 7}})


def test_a_job_extracts_typed_columns_and_tries_failed_rows_again(
    make_job: JobOf, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, retried, cut = '{"stars":4,"tags":["a"]}', '{"stars":5,"tags":[]}', '{"stars":3,"tags":["far too long"]}'
    job = make_job(texts([fits, None, retried, cut, "null"]))
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, "dspark_batch.testing.engine_factories:echoing")
    monkeypatch.setenv(FAILURES_VARIABLE, f"{retried}=engine_error")
    properties = {"stars": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}}
    job.config |= {
        "task": "extract",
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 30, "json_schema": {"type": "object", "properties": properties}},
        "shards": {"rows": 3},
        "limits": {"max_failed_fraction": 0.6},
    }
    assert run_cli(["run", job.write(), "--preview", "1"]) == ExitCode.OK
    assert 'answer={"stars": 4, "tags": ["a"]}' in capsys.readouterr().out
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"r1": "null_prompt", "r2": "engine_error", "r3": "incomplete_json"}
    assert "ended after 30 tokens, before its JSON was whole, by sampling.max_new_tokens" in capsys.readouterr().out
    monkeypatch.delenv(FAILURES_VARIABLE)
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.SOME_ROWS_FAILED
    table = read_output(str(job.out))
    assert table.schema.field("answer").type == pa.struct([("stars", pa.int64()), ("tags", pa.list_(pa.string()))])
    good = [{"stars": 4, "tags": ["a"]}, None, {"stars": 5, "tags": []}, None, None]
    assert table["answer"].to_pylist() == good
    assert errors_of(job) == {"r1": "null_prompt", "r3": "incomplete_json"}
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.3"]) == ExitCode.TOO_MANY_FAILED


def test_a_second_run_finds_nothing_to_do_and_makes_no_engine(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.OK
    before = job.parts()
    monkeypatch.setattr("dspark_batch.batch.executor.make_engine", lambda *a, **k: pytest.fail("an engine was made"))
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert "nothing to do: all 47 rows in 8 shards" in capsys.readouterr().out
    assert job.parts() == before


def test_deleting_one_output_file_makes_exactly_that_shard_again(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.OK
    before = job.parts()
    lost = sorted(before)[3]
    (job.out / lost).unlink()
    assert run_cli(["run", job.write()]) == ExitCode.OK
    after = job.parts()
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert {name for name in after if after[name][0] != before[name][0]} <= {lost}
    assert job.metrics()[-1]["done"]["num_shards"] == 1
    assert (job.out / "_SUCCESS").exists()


def test_success_is_withdrawn_while_a_shard_is_missing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.OK
    next(iter(job.out.glob("*.parquet"))).unlink()
    monkeypatch.setenv(FAULT_AFTER_VARIABLE, "0")
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert not (job.out / "_SUCCESS").exists()


def test_an_engine_that_breaks_is_loaded_again_and_its_shards_are_made_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli(["run", job.write()])
    undisturbed = job.parts()
    monkeypatch.setenv(FAULT_AFTER_VARIABLE, "20")
    job.config["output"]["path"] = str(job.folder / "disturbed")
    assert run_cli(["run", job.write()]) == ExitCode.OK
    files = {file.name: file.read_bytes() for file in (job.folder / "disturbed").glob("*.parquet")}
    assert files == {name: data for name, (_, data) in undisturbed.items()}


def test_an_engine_that_only_breaks_is_fatal_and_the_same_command_goes_on(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    kept = job.parts()
    assert 0 < len(kept) < 8
    monkeypatch.setenv(FAULT_AFTER_VARIABLE, "0")
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert "scripted fault after 0 samples" in capsys.readouterr().err
    monkeypatch.delenv(FAULT_AFTER_VARIABLE)
    assert run_cli(["run", job.write()]) == ExitCode.OK
    after = job.parts()
    assert all(after[name] == kept[name] for name in kept)
    assert sorted(read_output(str(job.out)).column("id").to_pylist()) == sorted(f"r{n}" for n in range(47))


def test_another_shard_size_or_concurrency_resumes_the_same_plan(job: Job) -> None:
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    assert run_cli(["run", job.write(), "shards.rows=5", "ray.shards_in_flight=4"]) == ExitCode.OK
    assert read_output(str(job.out)).num_rows == 47


def test_overwrite_begins_anew_under_other_settings(job: Job) -> None:
    run_cli(["run", job.write()])
    before = read_output(str(job.out))
    assert run_cli(["run", job.write(), "sampling.seed=5", "output.mode=overwrite"]) == ExitCode.OK
    after = read_output(str(job.out))
    assert after.num_rows == 47
    assert after.column("answer") != before.column("answer")


def test_mode_error_refuses_an_output_that_holds_a_run(job: Job, capsys: Capture) -> None:
    run_cli(["run", job.write()])
    assert run_cli(["run", job.write(), "output.mode=error"]) == ExitCode.FATAL
    assert "holds a run already" in capsys.readouterr().err


def test_samples_become_rows_of_their_own(job: Job) -> None:
    assert run_cli(["run", job.write(), "sampling.n=3"]) == ExitCode.OK
    table = read_output(str(job.out))
    assert table.num_rows == 3 * 47
    assert table.column("sample").to_pylist() == [0, 1, 2] * 47


def test_the_output_of_a_job_is_the_input_of_another_with_a_prefix(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.OK
    again = [f"input.path={job.out}", f"output.path={job.folder / 'second'}", "output.column=label"]
    assert run_cli(["run", job.write(), *again]) == ExitCode.BAD_CONFIG
    assert "'error' has the name of a column that the run adds; set output.prefix" in capsys.readouterr().err
    again += ["output.prefix=label_", "limits.max_failed_fraction=0.1"]
    monkeypatch.setenv(FAILURES_VARIABLE, "Say text 1=engine_error")
    assert run_cli(["run", job.write(), *again]) == ExitCode.SOME_ROWS_FAILED
    assert "engine_error" in capsys.readouterr().out.split("first rows")[1]
    monkeypatch.delenv(FAILURES_VARIABLE)
    assert run_cli(["run", job.write(), *again, "--retry-failed"]) == ExitCode.OK
    table = read_output(job.folder / "second")
    assert table.select(read_output(job.out).column_names).equals(read_output(job.out))
    assert table["label_error"].null_count == table.num_rows == 47


def test_jsonl_goes_in_and_parquet_comes_out(job: Job) -> None:
    lines = [json.dumps({"id": str(n), "text": f"line {n}"}) for n in range(23)]
    (job.folder / "in.jsonl").write_text("\n".join(lines))
    assert run_cli(["run", job.write(), f"input.path={job.folder / 'in.jsonl'}"]) == ExitCode.OK
    assert read_output(str(job.out)).column("id").to_pylist() == [str(n) for n in range(23)]


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_an_empty_table_is_a_finished_run_with_its_columns(make_job: JobOf, mode: str) -> None:
    job = make_job(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}))
    assert run_cli(["run", job.write(), f"output.mode={mode}"]) == ExitCode.OK
    assert (job.out / "_SUCCESS").exists()
    empty = read_output(job.out)
    assert empty.num_rows == 0
    pq.write_table(texts(["a"]), job.folder / "in.parquet")
    assert run_cli(["run", job.write(), "output.mode=overwrite"]) == ExitCode.OK
    assert read_output(job.out).num_rows == 1
    assert read_output(job.out).schema == empty.schema


def test_bad_input_missing_column(job: Job, capsys: Capture) -> None:
    job.config["prompt"]["template"] = "{{ txt }}"
    job.config["input"]["id"] = "key"
    assert run_cli(["run", job.write()]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert "prompt.template: the input has no column 'txt'" in err
    assert "input.id: the input has no column 'key'" in err
    assert not job.out.exists()


def test_bad_input_null_prompt(make_job: JobOf, capsys: Capture) -> None:
    job = make_job(texts(["a", None, "c"]))
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.5"]) == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"r1": "null_prompt"}
    out = capsys.readouterr().out
    assert "failed rows: 1 (33.3 %): null_prompt 1\n  id=r1 | error=null_prompt: NULL in column text\n" in out
    assert (job.out / "_SUCCESS").exists()
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.5", "--retry-failed"]) == 3
    assert "are committed, and no failed row may succeed on a retry\n" in capsys.readouterr().out


def test_a_run_with_failed_rows_may_end_with_0(make_job: JobOf, capsys: Capture) -> None:
    job = make_job(texts(["a", None, "c"]))
    job.config["limits"] = {"max_failed_fraction": 0.5, "exit_code_on_failed_rows": 0}
    for _ in range(2):
        assert run_cli(["run", job.write()]) == ExitCode.OK
        assert "failed rows: 1 (33.3 %): null_prompt 1" in capsys.readouterr().out
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.1"]) == ExitCode.TOO_MANY_FAILED


@pytest.mark.parametrize("flags", [[], ["--preview", "2"]])
def test_bad_input_values_that_python_cannot_hold_are_shown_as_such(
    make_job: JobOf, capsys: Capture, flags: list[str]
) -> None:
    broken = pa.array([b"a", b"caf\xe9", b"c"], pa.binary()).view(pa.string())
    far = pa.array([0, 4_000_000, 4_000_001], pa.int32()).view(pa.date32())
    job = make_job(pa.table({"text": broken, "day": far}))
    for column, shown in (("text", "caf� |"), ("day", "<unreadable value")):
        job.config["input"] = {"path": str(job.folder / "in.parquet"), "columns": [column]}
        job.config["output"]["path"] = str(job.folder / column)
        job.config["limits"] = {"max_failed_fraction": 0.5}
        code = run_cli(["run", job.write(), *flags])
        assert code == (ExitCode.OK if flags else ExitCode.SOME_ROWS_FAILED)
        out = capsys.readouterr().out
        assert f"{column}={shown}" in out
        assert ": column text: not valid UTF-8" in out
        assert "; mend it in the input" in out
        assert (job.folder / column / "_SUCCESS").exists() == (not flags)


def test_bad_input_text_that_is_not_utf8_comes_out_as_valid_text(job: Job) -> None:
    job.config["limits"] = {"max_failed_fraction": 0.5}
    inputs = {"in.csv": b"id,text,note\na,one,caf\xe9\nb,t\xe9,two\n"}
    inputs["in.jsonl"] = b'{"id":"a","text":"one","note":"caf\xe9"}\n{"id":"b","text":"t\xe9","note":"two"}\n'
    for name, content in inputs.items():
        (job.folder / name).write_bytes(content)
        out = job.folder / f"out-{name}"
        code = run_cli(["run", job.write(), f"input.path={job.folder / name}", f"output.path={out}"])
        assert code == ExitCode.SOME_ROWS_FAILED
        table = read_output(out)
        table.validate(full=True)
        assert table["note"].to_pylist() == ["caf�", "two"]
        assert table["text"].to_pylist() == ["one", "t�"]
        assert [error and error["code"] for error in table["error"].to_pylist()] == [None, "undecodable_text"]


def test_a_run_is_finished_before_its_summary_is_made(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(finished: object, **rest: object) -> None:
        raise OSError("no summary")

    monkeypatch.setattr("dspark_batch.job.runner.ending_outcome", broken)
    with pytest.raises(OSError, match="no summary"):
        run_cli(["run", job.write()])
    assert (job.out / "_SUCCESS").exists()


def test_bad_input_prompt_longer_than_the_context(make_job: JobOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURES_VARIABLE, "Say much too long=prompt_too_long")
    job = make_job(texts(["a", "b", "much too long"]))
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.5"]) == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"r2": "prompt_too_long"}


def test_bad_input_template_error_in_one_row(make_job: JobOf) -> None:
    job = make_job(texts(["1", "0", "4"]))
    job.config["prompt"]["template"] = "{{ 8 // (text | int) }}"
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.5"]) == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"r1": "template_error"}


def test_bad_input_template_that_does_not_parse(job: Job, capsys: Capture) -> None:
    job.config["prompt"]["template"] = "{{ text"
    assert run_cli(["run", job.write()]) == ExitCode.BAD_CONFIG
    assert "prompt.template: does not parse" in capsys.readouterr().err


def test_bad_input_unreadable_parquet_file(job: Job, capsys: Capture) -> None:
    (job.folder / "in.parquet").write_bytes(b"PAR1 not really")
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert f"{job.folder / 'in.parquet'}: cannot be read as Parquet" in capsys.readouterr().err


def test_bad_input_no_file_matches(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write(), f"input.path={job.folder}/none-*.parquet"]) == ExitCode.FATAL
    assert "no file matches" in capsys.readouterr().err


def test_bad_input_unknown_config_key(job: Job, capsys: Capture) -> None:
    job.config["sampling"]["temprature"] = 1
    assert run_cli(["run", job.write(), "ray.actor=2"]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert f"{job.path}: sampling.temprature: is not a known key; did you mean 'temperature'?" in err
    assert "command line: ray.actor: is not a known key; did you mean 'actors'?" in err


def test_bad_input_unknown_model(job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE)
    assert run_cli(["run", job.write(), "model.target=no-such-model"]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert "model.target" in err
    assert "no-such-model" in err


def test_bad_input_output_path_with_another_fingerprint(job: Job, capsys: Capture) -> None:
    run_cli(["run", job.write()])
    before = job.parts()
    job.config["prompt"]["template"] = "Shout {{ text }}"
    assert run_cli(["run", job.write(), "sampling.seed=9"]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert "prompt.template: 'Say {{ text }}' there, 'Shout {{ text }}' here" in err
    assert "sampling.seed: 0 there, 9 here" in err
    assert job.parts() == before


def test_bad_input_changed_since_the_run_began(job: Job, capsys: Capture) -> None:
    run_cli(["run", job.write()])
    pq.write_table(texts(["other"]), job.folder / "in.parquet")
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert f"changed: {job.folder / 'in.parquet'}" in capsys.readouterr().err


def test_output_folder_with_files_of_someone_else_is_refused(job: Job, capsys: Capture) -> None:
    job.out.mkdir()
    (job.out / "theirs.parquet").write_bytes(b"data")
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert "no run wrote" in capsys.readouterr().err
    assert [file.name for file in job.out.iterdir()] == ["theirs.parquet"]


def test_too_many_failed_rows_keep_their_commits_and_stay_without_success(make_job: JobOf, capsys: Capture) -> None:
    job = make_job(texts([None, "b", None]))
    assert run_cli(["run", job.write()]) == ExitCode.TOO_MANY_FAILED
    out = capsys.readouterr().out
    assert out.startswith("not done, too many rows failed; all 3 rows in 1 shard are committed")
    assert "limits.max_failed_fraction=0.05 allows, so _SUCCESS is not written\n" in out
    assert "  id=r0 | error=null_prompt: NULL in column text\n" in out
    assert len(job.parts()) == 1
    assert not (job.out / "_SUCCESS").exists()
    assert run_cli(["run", job.write()]) == ExitCode.TOO_MANY_FAILED
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=1"]) == ExitCode.SOME_ROWS_FAILED
    assert (job.out / "_SUCCESS").exists()


def test_a_token_budget_stops_the_run_and_a_higher_one_goes_on(job: Job, capsys: Capture) -> None:
    job.config["ray"] = {"shards_in_flight": 1}
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    assert "stopped at limits.max_generated_tokens=1" in capsys.readouterr().out
    num_before = len(job.parts())
    assert 0 < num_before <= 8
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    assert len(job.parts()) == num_before
    assert run_cli(["run", job.write()]) == ExitCode.OK


def test_a_run_stops_when_its_time_is_over_and_the_same_command_goes_on(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STEP_DELAY_VARIABLE, "0.05")
    job.config["ray"] = {"shards_in_flight": 1}
    job.config["limits"] = {"max_run_s": 1e-6}
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert re.match(
        r"stopped at limits\.max_run_s=1e-06: \d+ of 47 rows are committed; the same command goes on from here\n",
        capsys.readouterr().out,
    )
    before = job.parts()
    assert 0 < len(before) < 8
    assert run_cli(["run", job.write(), "limits.max_run_s=null"]) == ExitCode.OK
    assert {name: job.parts()[name] for name in before} == before


def test_retry_failed_makes_only_the_failed_rows_again(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = "Say text 3=engine_error;Say text 30=engine_error;Say text 12=prompt_too_long"
    monkeypatch.setenv(FAILURES_VARIABLE, failures)
    assert run_cli(["run", job.write(), "limits.max_failed_fraction=0.2"]) == ExitCode.SOME_ROWS_FAILED
    before = job.parts()
    capsys.readouterr()
    monkeypatch.delenv(FAILURES_VARIABLE)
    code = run_cli(["run", job.write(), "limits.max_failed_fraction=0.2", "--retry-failed"])
    assert code == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"r12": "prompt_too_long"}
    after = job.parts()
    assert len([name for name in after if after[name] != before[name]]) == 2
    last = job.metrics()[-1]
    assert (last["whole"]["num_rows"], last["whole"]["num_failed_rows"]) == (47, 1)
    again = [row for row in read_output(job.out).to_pylist() if row["id"] in ("r3", "r30")]
    assert (last["done"]["num_rows"], last["done"]["num_failed_rows"], last["done"]["num_shards"]) == (2, 0, 2)
    assert last["done"]["num_generated_tokens"] == sum(row["num_generated_tokens"] for row in again)
    out, err = capsys.readouterr()
    assert "done: 47 rows in 8 shards\nthis run: 2 rows in 2 shards" in out
    assert "2 rows in 2 shards to do" in err
    assert "rows 2/2 (100 %)" in err
    plain = job.folder / "plain"
    monkeypatch.setenv(FAILURES_VARIABLE, "Say text 12=prompt_too_long")
    run_cli(["run", job.write(), "limits.max_failed_fraction=0.2", f"output.path={plain}"])
    assert read_output(str(job.out)).equals(read_output(str(plain)))


def test_retry_failed_with_samples_keeps_the_rows_together(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.config["sampling"]["n"] = 2
    job.config["limits"] = {"max_failed_fraction": 0.2}
    monkeypatch.setenv(FAILURES_VARIABLE, "Say text 9=engine_error;Say text 46=engine_error")
    run_cli(["run", job.write()])
    monkeypatch.delenv(FAILURES_VARIABLE)
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.OK
    run_cli(["run", job.write(), f"output.path={job.folder / 'plain'}"])
    assert read_output(str(job.out)).equals(read_output(str(job.folder / "plain")))


def test_preview_shows_prompts_and_rows_and_writes_nothing(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write(), "--preview", "10"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert err == "loading smollm2-135m\ngenerating 10 rows\n"
    assert "prompt of row r0, 3 tokens:\n  Say text 0" in out
    assert "10 generated rows:" in out
    assert "  id=r9 | answer=" in out
    assert not job.out.exists()


def test_preview_looks_at_no_output(job: Job, capsys: Capture) -> None:
    run_cli(["run", job.write()])
    before = job.parts()
    pq.write_table(texts(["new"]), job.folder / "in.parquet")
    for more in ([], ["output.mode=error"], ["output.mode=overwrite"], ["prompt.template=Shout {{ text }}"]):
        capsys.readouterr()
        assert run_cli(["run", job.write(), *more, "--preview", "2"]) == ExitCode.OK
        assert "1 generated row:" in capsys.readouterr().out
    assert run_cli(["run", job.write(), "prompt.template={{ txt }}", "--preview", "2"]) == ExitCode.BAD_CONFIG
    assert job.parts() == before


def test_preview_shows_a_prompt_in_the_chat_template_with_its_tokens(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE)
    overrides = ["prompt.system=Be brief.", "sampling.max_new_tokens=1", "speculation.drafter=none"]
    assert run_cli(["run", job.write(), *overrides, "--preview", "1"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert "prompt of row r0, 21 tokens:\n  <|im_start|>system\n  Be brief.<|im_end|>\n  <|im_start|>user\n" in shown
    assert "  Say text 0<|im_end|>\n  <|im_start|>assistant\n" in shown


def test_dry_run_counts_rows_and_shards_and_writes_nothing(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, REFUSING)
    assert run_cli(["run", job.write(), "--dry-run"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "47 rows in 1 file, 8 shards" in out
    assert "fingerprint" in out
    assert not job.out.exists()


def test_rows_before_a_filter_are_shown_as_an_upper_bound(job: Job, capsys: Capture) -> None:
    job.config["input"]["filter"] = "stars > 44"
    assert run_cli(["run", job.write(), "shards.rows=100", "--dry-run"]) == ExitCode.OK
    assert "to do        at most 47 rows (before input.filter) in 1 shard" in capsys.readouterr().out
    assert run_cli(["run", job.write(), "shards.rows=100"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert "at most 47 rows (before input.filter) in 1 shard to do" in err
    assert "done: 2 rows in 1 shard" in out


def test_dry_run_reports_another_fingerprint(job: Job, capsys: Capture) -> None:
    run_cli(["run", job.write()])
    capsys.readouterr()
    assert run_cli(["run", job.write(), "--dry-run"]) == ExitCode.OK
    assert "to do        0 rows in 0 shards" in capsys.readouterr().out
    assert run_cli(["run", job.write(), "--dry-run", "sampling.seed=1"]) == ExitCode.BAD_CONFIG


def test_flags_that_exclude_each_other_are_refused(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write(), "--dry-run", "--retry-failed"]) == ExitCode.BAD_CONFIG
    assert "exclude each other" in capsys.readouterr().err


def test_a_hung_engine_ends_the_run_in_one_line_and_the_same_command_goes_on(
    job: Job, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = EngineFolder.make(job.folder / "engine", hang_once_after_rows=12)
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, COUNTING)
    job.config["model"] = {"target": str(folder.path)}
    job.config["engine"]["watchdog_s"] = 2.0
    job.config["ray"]["load_timeout_s"] = 2.0
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    err = capfd.readouterr().err
    assert "dspark-batch: the engine hangs: no progress for" in err
    assert "Traceback" not in err
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert sorted(read_output(str(job.out))["id"].to_pylist()) == sorted(f"r{n}" for n in range(47))


def engines_of(job: Job) -> list[EngineWork]:
    return list(read_run(str(job.out)).engines)


def test_a_run_ends_with_its_page_and_its_cost(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.OK
    out = capsys.readouterr().out
    assert f"report: {job.out}/_dspark/report.html\n" in out
    assert re.search(r"^cost: \S+ engine-hours of 1 engine; \S+ per million rows$", out, re.MULTILINE)
    page = (job.out / "_dspark" / "report.html").read_text()
    assert "<strong>47</strong>" in page
    assert ">finished<" in page
    (engine,) = engines_of(job)
    tokens = sum(read_output(job.out).column("num_generated_tokens").to_pylist())
    assert (engine.total.num_samples, engine.total.num_generated_tokens) == (47, tokens)
    assert 0 < engine.load_s <= engine.engine_s < 60


def test_resumed_retried_and_overwritten_runs_count_each_engine_once(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAILURES_VARIABLE, "Say text 1=engine_error")
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    assert "shards committed," in (job.out / "_dspark" / "report.html").read_text()
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    assert "with the starts before" in capsys.readouterr().out
    monkeypatch.delenv(FAILURES_VARIABLE)
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.OK
    assert [engine.total.num_samples for engine in engines_of(job)][-1] == 1
    assert sum(engine.total.num_samples for engine in engines_of(job)) == 48
    assert len({engine.run_id for engine in engines_of(job)}) == 3
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert len(engines_of(job)) == 3
    anew = [job.write(), "sampling.seed=5", "output.mode=overwrite"]
    assert run_cli(["run", *anew, "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    capsys.readouterr()
    assert run_cli(["report", str(job.out)]) == ExitCode.OK
    assert "beside the output that it is to replace" in capsys.readouterr().out
    assert run_cli(["run", *anew]) == ExitCode.OK
    assert len(engines_of(job)) == 2
    assert sum(engine.total.num_samples for engine in engines_of(job)) == 47
    assert ">finished<" in (job.out / "_dspark" / "report.html").read_text()


def test_a_run_that_an_engine_ended_has_a_page_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
    page = job.out / "_dspark" / "report.html"
    page.unlink()
    monkeypatch.setenv(FAULT_AFTER_VARIABLE, "0")
    assert run_cli(["run", job.write()]) == ExitCode.FATAL
    assert "not finished" in page.read_text()
    assert len(engines_of(job)) > 2


def test_a_page_that_cannot_be_drawn_does_not_fail_the_run(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(records: object) -> str:
        raise ZeroDivisionError("no page")

    monkeypatch.setattr("dspark_batch.report.page.draw_page", broken)
    assert run_cli(["run", job.write()]) == ExitCode.OK
    assert "warning: there is no report of this run: ZeroDivisionError: no page\n" in capsys.readouterr().out
    assert (job.out / "_SUCCESS").exists()
