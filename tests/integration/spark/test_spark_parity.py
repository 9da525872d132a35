"""The same texts as the local backend's, through every way in and for any partitioning."""

from __future__ import annotations

import pytest
from pyspark.errors import AnalysisException

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.errors import ConfigError
from dspark_batch.spark import generate, generate_udf, register, register_table_function
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.spark_rows import SCHEMA, TEMPLATE, job_values, local_texts, review_rows

pytestmark = pytest.mark.spark

GREEDY = {"temperature": 0.0}
HOT = {"temperature": 0.8, "seed": 11}


@pytest.fixture(scope="module")
def reviews(spark):
    frame = spark.createDataFrame(review_rows(), SCHEMA)
    frame.createOrReplaceTempView("reviews")
    return frame


@pytest.fixture(scope="module")
def module_engine(tmp_path_factory) -> EngineFolder:
    return EngineFolder.make(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module", params=[GREEDY, HOT], ids=["greedy", "hot"])
def sampling(request):
    return request.param


@pytest.fixture(scope="module")
def expected(tmp_path_factory, module_engine, sampling):
    return local_texts(tmp_path_factory.mktemp("local") / "run", target=module_engine.path, **sampling)


def texts(frame) -> dict[int, str | None]:
    rows = frame.select("review_id", "text").collect()
    found = {row.review_id: row.text for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(("num_partitions", "process"), [(1, "worker"), (5, "worker"), (3, "sidecar")])
def test_generate_gives_the_local_backends_texts(
    reviews, module_engine, sampling, expected, num_partitions, process
) -> None:
    config = {**job_values(module_engine.path, **sampling), "spark": {"engine_process": process, "rows_per_chunk": 9}}
    frame = generate(reviews.repartition(num_partitions), config, prompt=TEMPLATE, id="review_id")
    assert texts(frame) == expected


def test_the_column_function_gives_the_local_backends_texts(reviews, module_engine, sampling, expected) -> None:
    from pyspark.sql.functions import concat, lit

    udf = generate_udf(job_values(module_engine.path, **sampling))
    prompt = concat(lit("Summarise: "), "body")
    frame = reviews.repartition(3).withColumn("r", udf(prompt, "review_id")).select("review_id", "r.text")
    assert texts(frame) == expected


def test_the_sql_function_gives_the_local_backends_texts(spark, reviews, module_engine, sampling, expected) -> None:
    register(spark, "dspark_generate", job_values(module_engine.path))
    seed = sampling.get("seed", 0)
    frame = spark.sql(
        "SELECT review_id, dspark_generate('Summarise: ' || body, id => CAST(review_id AS STRING), "
        f"temperature => {sampling['temperature']}D, seed => {seed}).text AS text FROM reviews"
    )
    assert texts(frame) == expected


def test_the_table_function_gives_the_local_backends_texts(spark, reviews, module_engine, sampling, expected) -> None:
    register_table_function(spark, "dspark_generate_table", job_values(module_engine.path))
    seed = sampling.get("seed", 0)
    frame = spark.sql(
        f"SELECT * FROM dspark_generate_table(TABLE(reviews), prompt => '{TEMPLATE}', id => 'review_id', "
        f"temperature => {sampling['temperature']}D, seed => {seed})"
    )
    assert frame.columns[:4] == ["review_id", "body", "stars", "text"]
    assert texts(frame) == expected


def test_times_in_a_table_function_do_not_depend_on_the_zone_of_the_workers(spark, engine, monkeypatch) -> None:
    monkeypatch.setitem(spark.sparkContext.environment, "TZ", "America/New_York")
    register_table_function(spark, "dspark_generate_times", job_values(engine.path))
    spark.sql(
        "SELECT TIMESTAMP '2026-07-01 12:00:00+02:00' AS moment, TIMESTAMP_NTZ '2026-07-01 12:00:00' AS plain,"
        " array(named_struct('at', TIMESTAMP '2026-07-01 12:00:00+02:00')) AS nested"
    ).createOrReplaceTempView("times")
    template = "{{ moment }} {{ plain }} {{ nested[0].at }}"
    rows = spark.sql(
        f"SELECT * FROM dspark_generate_times(TABLE(times), prompt => '{template}', id => 'moment')"
    ).collect()
    assert engine.rows() == ["2026-07-01 10:00:00+00:00 2026-07-01 12:00:00 2026-07-01 10:00:00+00:00"]
    assert rows[0].moment == spark.table("times").first().moment


def test_a_real_models_texts_are_those_of_the_local_backend(
    spark, reviews, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights, sampled, in another batch: only seed and id may decide a draw."""
    from dspark_batch.testing.tiny import save_tiny_checkpoint

    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE)
    target = save_tiny_checkpoint(tmp_path / "tiny")
    expected = local_texts(tmp_path / "run", target=target, **HOT)
    config = {
        **job_values(target, **HOT),
        "speculation": {"drafter": "suffix"},
        "engine": {"max_concurrency": 5},
        "spark": {"engine_process": "sidecar", "rows_per_chunk": 9},
    }
    assert texts(generate(reviews, config, prompt=TEMPLATE, id="review_id", num_partitions=3)) == expected
    assert len(set(expected.values())) > 50


def test_what_is_wrong_with_a_call_is_said_before_anything_runs(spark, reviews, module_engine) -> None:
    config = job_values(module_engine.path)
    with pytest.raises(ConfigError, match="no column 'text'; its columns are: review_id, body, stars"):
        generate(reviews, config, prompt="Say {{ text }}")
    with pytest.raises(ConfigError, match="no column 'key'"):
        generate(reviews, config, prompt="body", id="key")
    with pytest.raises(ConfigError, match="'Text' differs from 'text' in case only"):
        generate(reviews.withColumnRenamed("stars", "Text"), config, prompt="body")
    with pytest.raises(ConfigError, match="is not a name for a SQL function"):
        register(spark, "drop table", config)


def test_calls_of_the_table_function_that_do_not_fit_say_why(spark, reviews, module_engine) -> None:
    register_table_function(spark, "dspark_generate_table", job_values(module_engine.path))
    for arguments, reason in {
        "prompt => 'nothing'": "neither a template",
        "promt => 'body'": "is not an argument",
        "id => 'review_id'": "prompt: is required",
    }.items():
        with pytest.raises(AnalysisException, match=reason):
            spark.sql(f"SELECT * FROM dspark_generate_table(TABLE(reviews), {arguments})")


def test_an_empty_table_and_empty_partitions_load_no_engine(spark, engine) -> None:
    frame = spark.createDataFrame([], SCHEMA)
    assert generate(frame, job_values(engine.path), prompt="body", num_partitions=3).count() == 0
    assert engine.loads() == []


def test_conversations_get_the_same_answers_through_every_way_in(
    spark, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template shows its argument, so that an answer depends on it."""
    from dspark_batch.batch.commit import read_output
    from dspark_batch.job.runner import run_job
    from dspark_batch.testing.tiny import save_tiny_checkpoint

    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE)
    target = save_tiny_checkpoint(tmp_path / "tiny")
    template = target / "chat_template.jinja"
    template.write_text("{{ mode }}" + template.read_text())
    talks = [[("user", "a"), ("assistant", "b"), ("user", "c")], [("user", "d")], None, [("assistant", "e")]]
    frame = spark.createDataFrame(list(enumerate(talks)), "key long, talk array<struct<role: string, content: string>>")
    frame.write.parquet(str(tmp_path / "in"))
    frame.createOrReplaceTempView("talks")
    prompt = {"chat_template_arguments": {"mode": "quick"}}
    config = {**job_values(target, **HOT), "prompt": {**prompt, "messages": "talk"}}
    run = {
        **config,
        "input": {"path": str(tmp_path / "in"), "id": "key"},
        "output": {"path": str(tmp_path / "out"), "column": "text"},
        "engine": {"backend": "local"},
        "limits": {"max_failed_fraction": 1.0},
    }
    run_job(run)
    expected = {row["key"]: row["text"] for row in read_output(str(tmp_path / "out")).to_pylist()}
    assert [key for key, text in sorted(expected.items()) if text is None] == [2, 3]
    assert answers(generate(frame, config, id="key", num_partitions=2)) == expected
    as_column = {**config, "prompt": {**prompt, "messages": "prompt"}}
    column = generate_udf(as_column)("talk", "key")
    assert answers(frame.withColumn("r", column).select("key", "r.text")) == expected
    register(spark, "dspark_answer", as_column)
    call = "dspark_answer(to_json(talk), id => CAST(key AS STRING)).text AS text"
    assert answers(spark.sql(f"SELECT key, {call} FROM talks")) == expected
    register_table_function(spark, "dspark_answer_table", config)
    assert answers(spark.sql("SELECT * FROM dspark_answer_table(TABLE(talks), id => 'key')")) == expected


def test_extracted_values_have_the_type_of_the_schema_in_every_way_in(spark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, "dspark_batch.testing.engine_factories:echoing")
    tag = {"type": "object", "properties": {"a tag": {"type": "string"}}}
    properties = {"n": {"type": "integer"}, "tags": {"type": "array", "items": tag}}
    schema = {"type": "object", "properties": properties}
    config = {"task": "extract", "sampling": {"json_schema": schema}, "output": {"column": "text"}}
    given = ['{"n":7,"tags":[{"a tag":"x"},{}]}', '{"tags":[]}', '{"n":']
    frame = spark.createDataFrame(list(enumerate(given)), "key long, body string").coalesce(1)
    frame.createOrReplaceTempView("json_texts")
    register(spark, "dspark_extract", config)
    register_table_function(spark, "dspark_extract_table", config)
    call = "dspark_extract(body, id => CAST(key AS STRING))"
    ways = [
        generate(frame, config, prompt="body", id="key"),
        frame.withColumn("r", generate_udf(config)("body", "key")).select("key", "r.text", "r.error"),
        spark.sql(f"SELECT key, r.text, r.error FROM (SELECT key, {call} AS r FROM json_texts)"),
        spark.sql("SELECT * FROM dspark_extract_table(TABLE(json_texts), prompt => 'body', id => 'key')"),
    ]
    expected = {
        0: ({"n": 7, "tags": [{"a tag": "x"}, {"a tag": None}]}, None),
        1: ({"n": None, "tags": []}, None),
        2: (None, "incomplete_json"),
    }
    rows = []
    for typed in ways:
        assert typed.schema["text"].dataType.simpleString() == "struct<n:bigint,tags:array<struct<a tag:string>>>"
        rows += typed.select("key", "text", "error.code").collect()
    found = [(row.key, (row.text and row.text.asDict(recursive=True), row.code)) for row in rows]
    assert sorted(found, key=lambda pair: pair[0]) == [pair for pair in expected.items() for _ in ways]


def answers(frame) -> dict[int, str | None]:
    return {row.key: row.text for row in frame.select("key", "text").collect()}


def test_choices_are_scored_through_every_way_in(spark, reviews, module_engine) -> None:
    config = {**job_values(module_engine.path, choices=["good", "bad"]), "task": "classify"}
    rows = generate(reviews, config, prompt=TEMPLATE, id="review_id").collect()
    expected = {row.review_id: row.probabilities for row in rows}
    for row in rows:
        if row.body is not None:
            assert row.probability == row.probabilities[row.text] == max(row.probabilities.values())
    register(spark, "dspark_classify", config)
    frame = spark.sql("SELECT review_id, dspark_classify('Summarise: ' || body) AS r FROM reviews")
    assert {row.review_id: row.r and row.r.probabilities for row in frame.collect()} == expected
    refused = spark.sql("SELECT dspark_classify('a', temperature => 0.5D).error AS error").first()
    assert "sampling.temperature must be 0" in refused.error.message
