from __future__ import annotations

import pyarrow as pa
import pytest

from dspark_batch.batch.schema import result_columns, row_schema
from dspark_batch.core import ChoiceScores, ErrorCode, FinishReason, Request, Result, RowError, TokenLogprobs
from dspark_batch.errors import ConfigError

INPUT = pa.schema([("id", pa.int64()), ("text", pa.string())])


def test_columns_pass_through_first_and_the_added_ones_follow_in_order(make_config):
    schema = row_schema(make_config(), input_schema=INPUT)
    assert schema.output.names == [
        "id",
        "text",
        "summary",
        "finish_reason",
        "num_prompt_tokens",
        "num_generated_tokens",
        "num_rounds",
        "num_drafted_tokens",
        "num_accepted_tokens",
        "error",
    ]


def test_options_add_sample_token_ids_and_logprobs(make_config):
    config = make_config(sampling={"n": 2, "temperature": 1.0, "logprobs": 1}, output={"token_ids": True})
    added = row_schema(config, input_schema=INPUT).added
    assert added.names[:3] == ["sample", "summary", "token_ids"]
    assert added.names[-2:] == ["logprobs", "error"]
    assert added.field("token_ids").type == pa.list_(pa.int32())


def test_only_the_named_columns_are_carried_over(make_config):
    assert row_schema(make_config(input={"columns": ["text"]}), input_schema=INPUT).carried == ("text",)


@pytest.mark.parametrize(
    ("sections", "names", "field", "text"),
    [
        ({"output": {"column": "text"}}, ["id", "text"], "output.column", "'text'"),
        ({"output": {"column": "error"}}, ["id"], "output.column", "'error'"),
        ({}, ["id", "num_rounds"], "input.columns", "'num_rounds'"),
        ({"input": {"columns": ["nope"]}}, ["id", "text"], "input.columns", "id, text"),
        ({"input": {"columns": ["id", "id"]}}, ["id"], "input.columns", "2 times"),
    ],
)
def test_name_collisions_and_missing_columns_are_config_errors(make_config, sections, names, field, text):
    with pytest.raises(ConfigError) as caught:
        row_schema(make_config(**sections), input_schema=pa.schema([(name, pa.string()) for name in names]))
    assert [(problem.field, text in problem.message) for problem in caught.value.problems] == [(field, True)]


def test_with_a_prefix_the_rows_of_a_run_can_be_the_input_of_another(make_config):
    first = row_schema(make_config(), input_schema=INPUT).output
    with pytest.raises(ConfigError, match=r"set output\.prefix"):
        row_schema(make_config(output={"column": "label"}), input_schema=first)
    section = {"column": "label", "prefix": "label_", "token_ids": True}
    schema = row_schema(make_config(output=section, sampling={"n": 2, "logprobs": 1}), input_schema=first)
    assert schema.added.names[:4] == ["label_sample", "label", "label_token_ids", "label_finish_reason"]
    assert schema.added.names[-2:] == ["label_logprobs", "label_error"]
    result = Result(id="a", sample=1, text="yes", token_ids=(3,), finish_reason=FinishReason.STOP, num_rounds=7)
    row = pa.Table.from_arrays(result_columns([result], schema=schema), schema=schema.added).to_pylist()[0]
    assert (row["label"], row["label_sample"], row["label_token_ids"], row["label_num_rounds"]) == ("yes", 1, [3], 7)


def test_a_column_that_is_not_carried_may_have_the_name_of_an_added_one(make_config):
    schema = pa.schema([("id", pa.int64()), ("error", pa.string())])
    assert row_schema(make_config(input={"columns": ["id"]}), input_schema=schema).output.names.count("error") == 1


def test_good_and_failed_rows_have_one_schema_and_failed_ones_no_output(make_config):
    config = make_config(output={"token_ids": True}, sampling={"logprobs": 1})
    schema = row_schema(config, input_schema=INPUT)
    good = Result(
        id="a",
        text="yes",
        token_ids=(3, 4),
        finish_reason=FinishReason.STOP,
        num_generated_tokens=2,
        logprobs=(TokenLogprobs(3, -0.5, (3,), (-0.5,)),),
    )
    error = RowError(code=ErrorCode.NULL_PROMPT, message="NULL in column text")
    bad = Result.failed(Request(id="b", prompt="x"), error)
    table = pa.Table.from_arrays(result_columns([good, bad], schema=schema), schema=schema.added)
    first, second = table.to_pylist()
    assert (first["summary"], first["token_ids"], first["error"]) == ("yes", [3, 4], None)
    assert first["logprobs"] == [{"token_id": 3, "logprob": -0.5, "top_token_ids": [3], "top_logprobs": [-0.5]}]
    assert (second["summary"], second["token_ids"], second["logprobs"]) == (None, None, None)
    assert second["finish_reason"] == "error"
    assert second["error"] == {"code": "null_prompt", "message": "NULL in column text", "retryable": False}


def test_a_classifying_run_adds_probabilities_that_are_null_in_failed_rows(make_config):
    config = make_config(task="classify", sampling={"choices": ["yes", "no"]}, output={"prefix": "p_"})
    schema = row_schema(config, input_schema=INPUT)
    assert schema.added.names[:5] == ["summary", "p_probability", "p_probabilities", "p_coverage", "p_finish_reason"]
    scores = ChoiceScores({"yes": 0.25, "no": 0.75}, coverage=0.5)
    good = Result(id="a", text="no", finish_reason=FinishReason.STOP, choice_scores=scores)
    bad = Result.failed(Request(id="b", prompt=""), RowError(code=ErrorCode.EMPTY_PROMPT, message="empty"))
    rows = pa.Table.from_arrays(result_columns([good, bad], schema=schema), schema=schema.added).to_pylist()
    assert [row["summary"] for row in rows] == ["no", None]
    assert [row["p_probability"] for row in rows] == [0.75, None]
    assert [row["p_probabilities"] for row in rows] == [[("yes", 0.25), ("no", 0.75)], None]
    assert [row["p_coverage"] for row in rows] == [0.5, None]
