from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import types as T  # noqa: N812

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.errors import ConfigError, EngineError, FingerprintMismatchError, OutputError
from dspark_batch.job.runner import run_job
from dspark_batch.spark import table
from dspark_batch.spark.jobs import resolve_config
from dspark_batch.spark.staging import (
    Stages,
    StagingFolder,
    check_types,
    microsecond_timestamps,
    without_not_null,
)
from dspark_batch.spark.table import submit_ray_job
from dspark_batch.testing.jobs import SCRIPTED

STAGES = Stages(source="a", target="b", schema="{}", settings={"sampling.seed": 1})


def test_what_was_done_is_remembered(tmp_path: Path) -> None:
    folder = StagingFolder(str(tmp_path / "staging"))
    assert folder.load() is None
    folder.save(replace(STAGES, is_staged=True))
    assert StagingFolder(str(tmp_path / "staging")).load() == replace(STAGES, is_staged=True)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text('{"source": "a"}')
    with pytest.raises(OutputError, match="not of this version"):
        StagingFolder(str(tmp_path)).load()


def test_a_folder_is_refused_where_other_rows_would_come_out_and_says_which_settings_changed(tmp_path: Path) -> None:
    folder = StagingFolder(str(tmp_path))
    schema = T.StructType([T.StructField("body", T.StringType())])

    def begin(**sections: object) -> Stages:
        job = resolve_config({"prompt": {"template": "{{ body }}"}, **sections})
        staged = table._staged_job(job, folder=folder, backend="spark")
        return table._begin(folder, source="a", target="b", schema=schema, job=staged)

    folder.save(replace(begin(), is_staged=True, is_landed=True))
    assert begin(engine={"max_concurrency": 3}, input={"path": "ignored"}, output={"path": "ignored"}).is_landed
    changed = {
        "prompt": {"template": "Say {{ body }}"},
        "model": {"target": "other", "revision": "r"},
        "sampling": {"seed": 7},
        "output": {"column": "other"},
    }
    with pytest.raises(FingerprintMismatchError) as error:
        begin(**changed)
    names = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]]
    assert names == ["model.revision", "model.target", "output.column", "prompt.template", "sampling.seed"]
    assert "use another staging folder (and if_exists='overwrite'" in str(error.value)


def test_spark_and_arrow_are_given_the_same_place(tmp_path: Path) -> None:
    folder = StagingFolder(str(tmp_path))
    assert folder.for_spark("input") == f"file://{tmp_path}/input"
    assert folder.for_arrow("input") == f"{tmp_path}/input"
    with_uri = StagingFolder(f"file://{tmp_path}/")
    assert with_uri.for_spark("input") == with_uri.for_arrow("input") == f"file://{tmp_path}/input"


class Conf:
    def __init__(self, value: str | None) -> None:
        self.value = value

    def get(self, name: str, default: str | None) -> str | None:
        return self.value if self.value is not None else default

    def set(self, name: str, value: str) -> None:
        self.value = value

    def unset(self, name: str) -> None:
        self.value = None


@pytest.mark.parametrize("before", [None, "INT96"])
def test_the_sessions_timestamp_setting_comes_back_after_an_error_too(before: str | None) -> None:
    class Session:
        conf = Conf(before)

    def write() -> None:
        with microsecond_timestamps(Session()):
            assert Session.conf.value == "TIMESTAMP_MICROS"
            raise OSError

    with pytest.raises(OSError):
        write()
    assert Session.conf.value == before


def column(name: str, kind: T.DataType) -> T.StructField:
    return T.StructField(name, kind)


def test_types_that_parquet_changes_are_refused_wherever_they_hide() -> None:
    inner = T.StructType([column("x", T.DecimalType(9, 2)), column("y", T.TimestampNTZType())])
    nested = T.ArrayType(T.MapType(T.StringType(), inner))
    fine = [T.IntegerType(), nested, T.BinaryType(), T.VarcharType(9), T.DateType(), T.TimestampType()]
    check_types(T.StructType([column(f"c{place}", kind) for place, kind in enumerate(fine)]))
    wrong = {
        "a": T.ArrayType(T.DayTimeIntervalType()),
        "b": T.StructType([column("x", T.VariantType())]),
        "c": T.NullType(),
        "d": T.MapType(T.IntegerType(), T.NullType()),
        "e": T.StructType([]),
    }
    with pytest.raises(ConfigError) as error:
        check_types(T.StructType([column("fine", nested), *(column(name, kind) for name, kind in wrong.items())]))
    assert [problem.message.split("'")[1] for problem in error.value.problems] == list(wrong)


def test_null_may_be_anywhere_in_a_table_and_nothing_else_changes() -> None:
    def schema(allowed: bool) -> T.StructType:
        inner = T.StructType([T.StructField("x", T.DecimalType(9, 2), allowed)])
        cells = T.MapType(T.StringType(), T.ArrayType(inner, containsNull=allowed), valueContainsNull=allowed)
        return T.StructType([T.StructField("cells", cells, allowed, {"comment": "kept"})])

    assert without_not_null(schema(allowed=False)) == without_not_null(schema(allowed=True)) == schema(allowed=True)
    assert without_not_null(schema(allowed=False)).fields[0].metadata == {"comment": "kept"}


def test_a_submitted_job_in_which_rows_failed_is_no_failed_job(tmp_path: Path, monkeypatch) -> None:
    codes = []

    def submit(working_dir: str, *, address: str) -> None:
        codes.append(run_job(f"{working_dir}/job.yaml", overrides=["engine.backend=local"]).code)

    monkeypatch.setattr(table, "submit_ray_job", submit)
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    (tmp_path / "input").mkdir()
    pq.write_table(pa.table({"body": ["a", None]}), tmp_path / "input" / "part.parquet")
    job = resolve_config({"prompt": {"template": "{{ body }}"}, "limits": {"max_failed_fraction": 0.5}})
    staged = table._staged_job(job, folder=StagingFolder(str(tmp_path)), backend="ray")
    table._run(staged, ray_job_address="http://127.0.0.1:8265")
    assert codes == [0]


def test_a_submitted_ray_job_runs_the_job_file_and_reports_its_failure() -> None:
    commands = []

    def run(command, *, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=len(commands) - 1)

    submit_ray_job("/tmp/w", address="http://127.0.0.1:8265", run=run)
    assert commands[0][:3] == [sys.executable, "-m", "ray.scripts.scripts"]
    assert commands[0][-4:] == ["--", "dspark-batch", "run", "job.yaml"]
    with pytest.raises(EngineError, match=r"ended with status 1; .* resume"):
        submit_ray_job("/tmp/w", address="http://127.0.0.1:8265", run=run)
