"""The row contract: which columns a run adds to its input, with one schema for good and failed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pyarrow as pa

from dspark_batch.batch.json_columns import JsonColumn, json_part
from dspark_batch.core import ChoiceScores, Result
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import JobConfig

ROW_CONTRACT_VERSION = 1
"""Part of a run's fingerprint: goes up whenever the added columns or their meaning change."""

ERROR_TYPE = pa.struct([("code", pa.string()), ("message", pa.string()), ("retryable", pa.bool_())])
LOGPROBS_TYPE = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("logprob", pa.float32()),
            ("top_token_ids", pa.list_(pa.int32())),
            ("top_logprobs", pa.list_(pa.float32())),
        ]
    )
)
SCORE_FIELDS = (
    ("probability", pa.float64()),
    ("probabilities", pa.map_(pa.string(), pa.float64())),
    ("coverage", pa.float64()),
)
COUNT_COLUMNS = (
    "num_prompt_tokens",
    "num_generated_tokens",
    "num_rounds",
    "num_drafted_tokens",
    "num_accepted_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSchema:
    """Columns of a run: those carried over from the input, the generated one, all added ones, and the whole.

    The names of added columns other than the generated one begin with ``prefix``. ``json`` is how the generated column
    holds its texts where it has the type of a JSON schema.
    """

    carried: tuple[str, ...]
    generated: str
    prefix: str
    added: pa.Schema
    output: pa.Schema
    json: JsonColumn | None = None


def row_schema(config: JobConfig, *, input_schema: pa.Schema) -> RowSchema:
    """The schema of every output file of a run, from the schema of the table as it is read.

    Carried columns (``input.columns``, or all) come first, untouched; then ``sample`` (only with ``sampling.n`` > 1),
    the generated column, the scores (only with ``task`` classify), ``token_ids`` (only with ``output.token_ids``),
    ``finish_reason``, the counts, ``logprobs`` (only with ``sampling.logprobs``) and ``error``. The generated column is
    text, or of the type of ``sampling.json_schema`` where ``task`` is extract; it is NULL in failed rows.
    ``output.prefix`` stands before the names of all added columns but the generated one.

    Raises:
        ConfigError: a carried column is missing or occurs twice, or an added column has the name of a carried one.
    """
    carried = tuple(config.input.columns if config.input.columns is not None else input_schema.names)
    json = _json_column(config)
    added = _added_fields(config, generated=pa.string() if json is None else json.part.type)
    problems = missing_columns("input.columns", carried, schema=input_schema)
    problems += [
        Problem("input.columns", f"column {name!r} occurs {carried.count(name)} times; rename it in the input")
        for name in sorted(set(carried))
        if carried.count(name) > 1
    ]
    problems += _collisions(config, carried=carried, added=added)
    if problems:
        raise ConfigError(problems)
    kept = [input_schema.field(name) for name in carried]
    return RowSchema(
        carried=carried,
        generated=config.output.column,
        prefix=config.output.prefix,
        added=pa.schema(added),
        output=pa.schema([*kept, *added]),
        json=json,
    )


def missing_columns(field: str, names: Sequence[str], *, schema: pa.Schema) -> list[Problem]:
    """One problem for every name that the input schema lacks, with the columns that it has."""
    available = ", ".join(schema.names) or "none"
    return [
        Problem(field, f"the input has no column {name!r}; its columns are: {available}")
        for name in names
        if name not in schema.names
    ]


def is_list(kind: pa.DataType) -> bool:
    """Whether values of the type are lists, of any kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def result_columns(results: Sequence[Result], *, schema: RowSchema) -> list[pa.Array[Any]]:
    """The added columns of the given samples, in the order of ``schema.added``; one row per result.

    A sample whose text does not become a value of its column's type is a failed one.
    """
    typed: list[object] | None = None
    if schema.json is not None:
        results, typed = schema.json.read(results)
    has_errors = any(result.error is not None for result in results)
    columns = []
    for field in schema.added:
        name = "text" if field.name == schema.generated else field.name.removeprefix(schema.prefix)
        values = typed if typed is not None and name == "text" else _values(name, results, has_errors=has_errors)
        columns.append(pa.array(values, type=field.type))
    return columns


def _json_column(config: JobConfig) -> JsonColumn | None:
    if config.task != "extract":
        return None
    assert config.sampling.json_schema is not None, "extract needs a schema"
    return JsonColumn(part=json_part(config.sampling.json_schema), max_new_tokens=config.sampling.max_new_tokens)


def _added_fields(config: JobConfig, *, generated: pa.DataType) -> list[pa.Field[Any]]:
    name_of = config.output.name_of
    fields: list[pa.Field[Any]] = []
    if config.sampling.n > 1:
        fields.append(pa.field(name_of("sample"), pa.int32()))
    fields.append(pa.field(config.output.column, generated))
    if config.task == "classify":
        fields.extend(pa.field(name_of(name), kind) for name, kind in SCORE_FIELDS)
    if config.output.token_ids:
        fields.append(pa.field(name_of("token_ids"), pa.list_(pa.int32())))
    fields.append(pa.field(name_of("finish_reason"), pa.string()))
    fields.extend(pa.field(name_of(name), pa.int32()) for name in COUNT_COLUMNS)
    if config.sampling.logprobs is not None:
        fields.append(pa.field(name_of("logprobs"), LOGPROBS_TYPE))
    fields.append(pa.field(name_of("error"), ERROR_TYPE))
    return fields


def _collisions(config: JobConfig, *, carried: Sequence[str], added: Sequence[pa.Field[Any]]) -> list[Problem]:
    problems: list[Problem] = []
    fixed = [field.name for field in added]
    fixed.remove(config.output.column)
    if config.output.column in fixed:
        problems.append(Problem("output.column", f"{config.output.column!r} is the name of a column that a run adds"))
    if config.output.column in carried:
        problems.append(
            Problem("output.column", f"the input already has a column {config.output.column!r}; choose another name")
        )
    problems += [
        Problem(
            "input.columns",
            f"input column {name!r} has the name of a column that the run adds; set output.prefix, or leave it out of "
            "input.columns",
        )
        for name in fixed
        if name in carried
    ]
    return problems


def _values(name: str, results: Sequence[Result], *, has_errors: bool) -> list[Any]:
    """One added column. Every row passes here several times, so plain attributes are taken without a Python frame."""
    if name in ("text", "token_ids"):
        take = attrgetter(name)
        if not has_errors:
            return list(map(take, results))
        return [None if result.error is not None else take(result) for result in results]
    match name:
        case "finish_reason":
            return list(map(attrgetter("finish_reason._value_"), results))
        case "logprobs":
            return [_logprobs(result) for result in results]
        case "probability" | "probabilities" | "coverage":
            return [None if result.choice_scores is None else _score(name, result.choice_scores) for result in results]
        case "error":
            return [_error(result) for result in results] if has_errors else [None] * len(results)
        case _:
            return list(map(attrgetter(name), results))


def _logprobs(result: Result) -> list[dict[str, object]] | None:
    if result.logprobs is None or result.error is not None:
        return None
    return [
        {
            "token_id": entry.token_id,
            "logprob": entry.logprob,
            "top_token_ids": entry.top_token_ids,
            "top_logprobs": entry.top_logprobs,
        }
        for entry in result.logprobs
    ]


def _score(name: str, scores: ChoiceScores) -> object:
    if name == "coverage":
        return scores.coverage
    return max(scores.probs.values()) if name == "probability" else list(scores.probs.items())


def _error(result: Result) -> dict[str, object] | None:
    error = result.error
    if error is None:
        return None
    return {"code": error.code.value, "message": error.message, "retryable": error.retryable}
