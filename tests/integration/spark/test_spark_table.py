"""Whole tables through a job and back: nothing lost on the way, and every stage can be interrupted."""

from __future__ import annotations

import pytest
import yaml

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.errors import ConfigError, FingerprintMismatchError, OutputError
from dspark_batch.spark import run_table
from dspark_batch.spark import table as table_module
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.spark_rows import job_values
from dspark_batch.testing.wide_table import NULL_ID, WIDE_SCHEMA, canonical, wide_rows

pytestmark = pytest.mark.spark

NUM_ROWS = 23


@pytest.fixture(scope="module")
def source(spark):
    frame = spark.createDataFrame(wide_rows(NUM_ROWS), WIDE_SCHEMA)
    frame.write.mode("overwrite").saveAsTable("wide_source")
    return spark.table("wide_source")


@pytest.fixture
def table_job(engine: EngineFolder) -> dict:
    return {**job_values(engine.path), "shards": {"rows": 5}, "limits": {"max_failed_fraction": 1.0}}


@pytest.fixture
def target(spark, request):
    name = f"target_{abs(hash(request.node.name)) % 10**8}"
    yield name
    spark.sql(f"DROP TABLE IF EXISTS {name}")


def generate_table(spark, target, config, staging, **kwargs):
    return run_table(
        spark,
        "wide_source",
        target,
        config,
        staging=str(staging),
        backend="spark",
        prompt="Say {{ body }}",
        id="id",
        **kwargs,
    )


def test_a_table_comes_back_with_every_untouched_column_as_it_was(
    spark, source, engine, table_job, target, tmp_path
) -> None:
    from pyspark.testing import assertDataFrameEqual

    result = generate_table(spark, target, table_job, tmp_path / "staging")
    untouched = result.select(*source.columns)
    assert untouched.schema == source.schema
    assertDataFrameEqual(untouched.drop("counts"), source.drop("counts"))
    assert canonical(untouched) == canonical(source)
    texts = {row.id: (row.text, row.error) for row in result.collect()}
    assert texts[NULL_ID][0] is None
    assert texts[NULL_ID][1].code == "null_prompt"
    assert all(text for row_id, (text, _) in texts.items() if row_id != NULL_ID)
    assert len(engine.rows()) == NUM_ROWS + 1
    assert spark.conf.get("spark.sql.parquet.outputTimestampType") == "INT96"


class InterruptedRunError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("stage", ["_stage", "_run", "_land"])
def test_a_run_that_is_killed_in_a_stage_resumes_there(
    spark, source, engine, table_job, target, tmp_path, monkeypatch, stage
) -> None:
    def interrupted(*args, **kwargs):
        raise InterruptedRunError

    halves = {"_stage": (table_module.StagingFolder, "save"), "_run": (table_module, "_land")}
    with monkeypatch.context() as patch:
        if stage == "_land":
            saves = []
            save = table_module.StagingFolder.save
            patch.setattr(
                table_module.StagingFolder,
                "save",
                lambda self, stages: interrupted() if stages.is_landed else (saves.append(stages), save(self, stages)),
            )
        else:
            patch.setattr(*halves[stage], interrupted)
        with pytest.raises(InterruptedRunError):
            generate_table(spark, target, table_job, tmp_path / "staging")
    result = generate_table(spark, target, table_job, tmp_path / "staging")
    assert canonical(result.select(*source.columns)) == canonical(source)
    assert len(engine.rows()) == NUM_ROWS + 1
    again = generate_table(spark, target, table_job, tmp_path / "staging")
    assert again.count() == NUM_ROWS + 2
    assert len(engine.rows()) == NUM_ROWS + 1


def test_shards_that_a_dead_task_committed_are_not_generated_again(spark, source, engine, table_job, target, tmp_path):
    EngineFolder.make(engine.path, die_once_after_rows=8, max_concurrency=2)
    result = generate_table(spark, target, table_job, tmp_path / "staging")
    assert canonical(result.select(*source.columns)) == canonical(source)
    assert (engine.path / "died").exists()
    assert NUM_ROWS + 1 < len(engine.rows()) < 2 * NUM_ROWS


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
def test_a_ray_job_gives_the_rows_that_spark_tasks_give(spark, source, engine, table_job, target, tmp_path) -> None:
    through_spark = canonical(generate_table(spark, target, table_job, tmp_path / "one"))
    spark.sql(f"DROP TABLE {target}")
    rows = run_table(
        spark, "wide_source", target, table_job, staging=str(tmp_path / "two"), prompt="Say {{ body }}", id="id"
    )
    assert canonical(rows) == through_spark


@pytest.mark.slow
def test_extracted_values_come_back_with_their_types(spark, target, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, "dspark_batch.testing.engine_factories:echoing")
    tag = {"type": "object", "properties": {"a tag": {"type": "string"}}}
    schema = {"type": "object", "properties": {"tags": {"type": "array", "items": tag}}}
    config = {"task": "extract", "sampling": {"json_schema": schema}, "limits": {"max_failed_fraction": 1.0}}
    frame = spark.createDataFrame([(1, '{"tags":[{"a tag":"x"}]}'), (2, '{"tags":')], "id long, body string")
    result = run_table(
        spark, frame, target, config, staging=str(tmp_path), backend="spark", prompt="body", id="id", column="text"
    )
    assert result.schema["text"].dataType.simpleString() == "struct<tags:array<struct<a tag:string>>>"
    rows = {row.id: (row.text and row.text.asDict(True), row.error and row.error.code) for row in result.collect()}
    assert rows == {1: ({"tags": [{"a tag": "x"}]}, None), 2: (None, "incomplete_json")}


def test_an_existing_target_and_a_foreign_staging_folder_are_refused(
    spark, source, table_job, target, tmp_path
) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        generate_table(spark, "wide_source", table_job, tmp_path / "staging")
    generate_table(spark, target, table_job, tmp_path / "staging")
    with pytest.raises(OutputError, match="begun with another target"):
        generate_table(spark, f"{target}_other", table_job, tmp_path / "staging")
    hotter = {**table_job, "sampling": {"temperature": 0.3, "seed": 5}}
    with pytest.raises(FingerprintMismatchError, match=r"sampling\.seed: 0 there, 5 here"):
        generate_table(spark, target, hotter, tmp_path / "staging")
    limits = {"limits": {"max_failed_fraction": 0.9}, "shards": {"rows": 7}}
    assert generate_table(spark, target, {**table_job, **limits}, tmp_path / "staging").count() == NUM_ROWS + 2


def test_a_type_that_parquet_would_change_is_named(spark, table_job, tmp_path) -> None:
    frame = spark.sql("SELECT 1 AS id, 'x' AS body, INTERVAL '2' DAY AS wait")
    with pytest.raises(ConfigError, match="'wait' has type interval day"):
        run_table(spark, frame, "never", table_job, staging=str(tmp_path), prompt="body", backend="spark")


def test_the_table_command_runs_under_the_session_of_its_process(
    spark, source, table_job, target, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump({**table_job, "prompt": {"template": "Say {{ body }}"}}))
    arguments = ["--source", "wide_source", "--target", target, "--staging", str(tmp_path / "s"), "--backend", "spark"]
    assert run_cli(["table", str(config), "sampling.max_new_tokens=2", *arguments]) == 0
    assert f"{target}: {NUM_ROWS + 2} rows" in capsys.readouterr().out
    assert spark.table(target).filter("num_generated_tokens > 2").count() == 0
