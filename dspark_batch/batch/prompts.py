"""Rows to requests: sandboxed Jinja2 templates, checked against the input schema before the first row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import jinja2
import pyarrow as pa

from dspark_batch.batch.conversations import check_messages, messages_of
from dspark_batch.batch.schema import is_list, missing_columns
from dspark_batch.batch.templates import CompiledTemplate
from dspark_batch.core import ErrorCode, Message, Request, RowError, SamplingParams
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import PromptSection

SYSTEM_SEPARATOR = "\n\n"
"""Stands between system text and prompt where the checkpoint has no chat template."""

MAX_TOKEN_ID = 2**31 - 1

_Outcome = Request | RowError


@dataclass(frozen=True, slots=True)
class UnreadableValue:
    """Stands in a row for a column value that cannot be turned into a Python object."""

    error: RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """A table of text: its columns, and the rendered templates of every row."""

    columns: dict[str, list[str | None]]
    users: list[str]
    systems: list[str] | None


class PromptRenderer:
    """Makes the request of every row: chat messages, raw text or ready-made token ids.

    A column of conversations gives messages as they are, after the system text where they have no system message.

    With ``chat`` auto or always and a checkpoint that has a chat template, the system text and the rendered template
    become a system and a user message. Else the prompt is raw text: the system text, an empty line, the template.
    Templates see the row's columns and nothing else; arithmetic, ``range`` and the length are bounded. A row fails
    where every column of the template is NULL, or, with ``nulls`` error, any that the prompt reads.
    Tables of text under templates that only insert columns are rendered column by column; ``use_fast_path=False``
    renders them row by row as well, for comparison.

    Raises:
        ConfigError: a template does not parse or names a column that the input lacks, the column of token ids or
            messages is missing or of another type, or the section needs a chat template and the checkpoint has none.
    """

    def __init__(
        self,
        section: PromptSection,
        *,
        sampling: SamplingParams,
        input_schema: pa.Schema,
        has_chat_template: bool,
        use_fast_path: bool = True,
    ) -> None:
        problems = check_prompt(section, input_schema=input_schema)
        if not has_chat_template:
            problems += _check_without_chat_template(section)
        if problems:
            raise ConfigError(problems)
        self._sampling = sampling
        self._use_fast_path = use_fast_path
        self._token_ids = section.token_ids
        self._messages = section.messages
        self._arguments = section.chat_template_arguments
        self._template = None if section.template is None else CompiledTemplate(section.template)
        self._system = None if section.system is None else CompiledTemplate(section.system)
        self._as_chat = has_chat_template and section.chat != "never"
        self.columns = prompt_columns(section)
        self._not_null: tuple[str, ...] = () if self._template is None else self._template.columns
        if section.messages is not None:
            self._not_null = (section.messages,)
        self._is_null: Callable[[Iterable[bool]], bool] = all
        if section.nulls == "error":
            self._not_null, self._is_null = self.columns, any

    def render_table(self, table: pa.Table, *, ids: tuple[str, ...]) -> Iterator[_Outcome]:
        """The request, or the reason why there is none, of every row in order. Never raises for a row."""
        texts = self._texts(table) if self._use_fast_path else None
        if texts is None:
            return self._render_rows(table, ids=ids)
        return self._render_texts(texts, ids=ids)

    def _render_rows(self, table: pa.Table, *, ids: tuple[str, ...]) -> Iterator[_Outcome]:
        used = [python_values(table.column(name)) for name in self.columns]
        names = self.columns
        rows = zip(*used, strict=True) if used else repeat(())
        for row_id, values in zip(ids, rows, strict=False):
            yield self.render(dict(zip(names, values, strict=True)), row_id=row_id)

    def _texts(self, table: pa.Table) -> _Texts | None:
        """Columns and prompts of a table in which all that the templates need is text; None where it is not."""
        if self._template is None or not all(_is_text(table.schema.field(name).type) for name in self.columns):
            return None
        try:
            columns = {name: table.column(name).to_pylist() for name in self.columns}
        except (UnicodeDecodeError, pa.ArrowException):
            return None
        users = self._template.join_texts(columns, num_rows=table.num_rows)
        systems = None
        if self._system is not None:
            systems = self._system.join_texts(columns, num_rows=table.num_rows)
        if users is None or (systems is None and self._system is not None):
            return None
        return _Texts(columns=columns, users=users, systems=systems)

    def _render_texts(self, texts: _Texts, *, ids: tuple[str, ...]) -> Iterator[_Outcome]:
        """What ``_render_rows`` gives, without looking at every row's columns again."""
        assert self._template is not None
        inserted = [texts.columns[name] for name in self._not_null]
        has_null_rows = bool(inserted) and self._is_null(None in values for values in inserted)
        system, turns = "", tuple[Message, ...]()
        for row, (row_id, user) in enumerate(zip(ids, texts.users, strict=True)):
            if not user or (has_null_rows and self._is_null(values[row] is None for values in inserted)):
                yield self.render({name: values[row] for name, values in texts.columns.items()}, row_id=row_id)
                continue
            if texts.systems is not None and texts.systems[row] != system:
                system = texts.systems[row]
                turns = (Message("system", system),) if system else ()
            if self._as_chat:
                yield self._chat((*turns, Message("user", user)), row_id=row_id)
            else:
                text = f"{system}{SYSTEM_SEPARATOR}{user}" if system else user
                yield Request(id=row_id, prompt=text, sampling=self._sampling)

    def render(self, row: Mapping[str, object], *, row_id: str) -> _Outcome:
        """The request of one row (column name to Python value; only ``columns`` are looked at)."""
        for name, value in row.items():
            if isinstance(value, UnreadableValue):
                message = f"column {name}: {value.error.message}; mend it in the input"
                return replace(value.error, message=message)
        if self._token_ids is not None:
            return self._from_token_ids(row[self._token_ids], row_id=row_id)
        names = self._not_null
        if names and self._is_null(row[name] is None for name in names):
            nulls = ", ".join(name for name in names if row[name] is None)
            return RowError(code=ErrorCode.NULL_PROMPT, message=f"NULL in column {nulls}")
        if self._messages is not None:
            return self._from_messages(row[self._messages], row, row_id=row_id)
        return self._from_template(row, row_id=row_id)

    def _from_messages(self, value: object, row: Mapping[str, object], *, row_id: str) -> _Outcome:
        assert self._messages is not None
        messages = messages_of(value, column=self._messages)
        if isinstance(messages, RowError):
            return messages
        if self._system is not None and all(message.role != "system" for message in messages):
            system = _rendered(self._system, row, field="prompt.system")
            if isinstance(system, RowError):
                return system
            messages = (Message("system", system), *messages) if system else messages
        return self._chat(messages, row_id=row_id)

    def _chat(self, messages: tuple[Message, ...], *, row_id: str) -> Request:
        return Request(id=row_id, messages=messages, chat_template_arguments=self._arguments, sampling=self._sampling)

    def _from_template(self, row: Mapping[str, object], *, row_id: str) -> _Outcome:
        assert self._template is not None
        user = _rendered(self._template, row, field="prompt.template")
        system = "" if self._system is None else _rendered(self._system, row, field="prompt.system")
        if isinstance(user, RowError):
            return user
        if isinstance(system, RowError):
            return system
        if not user:
            return RowError(code=ErrorCode.EMPTY_PROMPT, message="prompt.template rendered to an empty text")
        if not self._as_chat:
            text = f"{system}{SYSTEM_SEPARATOR}{user}" if system else user
            return Request(id=row_id, prompt=text, sampling=self._sampling)
        turns = (Message("system", system),) if system else ()
        return self._chat((*turns, Message("user", user)), row_id=row_id)

    def _from_token_ids(self, value: object, *, row_id: str) -> _Outcome:
        if value is None:
            return RowError(code=ErrorCode.NULL_PROMPT, message=f"NULL in column {self._token_ids}")
        assert isinstance(value, list), type(value)
        if not value:
            return RowError(code=ErrorCode.EMPTY_PROMPT, message=f"no token ids in column {self._token_ids}")
        for place, token in enumerate(value):
            if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
                return RowError(
                    code=ErrorCode.INVALID_TOKEN_IDS, message=f"column {self._token_ids}: {token!r} at position {place}"
                )
        return Request(id=row_id, prompt_token_ids=tuple(value), sampling=self._sampling)


def check_prompt(section: PromptSection, *, input_schema: pa.Schema) -> list[Problem]:
    """Every problem of the prompt section that can be known before a model is loaded."""
    problems: list[Problem] = []
    for field, text in (("prompt.template", section.template), ("prompt.system", section.system)):
        if text is None:
            continue
        try:
            columns = CompiledTemplate(text).columns
        except jinja2.TemplateSyntaxError as error:
            problems.append(
                Problem(field, f"does not parse as a Jinja2 template: {error.message} (line {error.lineno})")
            )
            continue
        problems += missing_columns(field, columns, schema=input_schema)
    if section.token_ids is not None:
        problems += _check_token_ids(section.token_ids, schema=input_schema)
    if section.messages is not None:
        problems += check_messages(section.messages, schema=input_schema)
    return problems


def prompt_columns(section: PromptSection) -> tuple[str, ...]:
    """The columns that the prompt section reads, sorted. Templates that do not parse count as reading none."""
    names = {name for name in (section.token_ids, section.messages) if name is not None}
    for text in (section.template, section.system):
        if text is None:
            continue
        try:
            names.update(CompiledTemplate(text).columns)
        except jinja2.TemplateSyntaxError:
            continue
    return tuple(sorted(names))


def _check_without_chat_template(section: PromptSection) -> list[Problem]:
    """What in the section needs a chat template."""
    problems: list[Problem] = []
    if section.messages is not None:
        message = "needs a chat template, and the model has none; use prompt.template, which can loop over the column"
        problems.append(Problem("prompt.messages", message))
    if section.chat == "always" and section.token_ids is None:
        problems.append(Problem("prompt.chat", "is 'always', but the model has no chat template; use auto or never"))
    if section.chat_template_arguments:
        message = "are for a chat template, and the model has none; leave them out"
        problems.append(Problem("prompt.chat_template_arguments", message))
    return problems


def _check_token_ids(name: str, *, schema: pa.Schema) -> list[Problem]:
    problems = missing_columns("prompt.token_ids", [name], schema=schema)
    if problems:
        return problems
    kind = schema.field(name).type
    if is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
        return []
    return [Problem("prompt.token_ids", f"column {name!r} has type {kind}; it must be a list of integers")]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _rendered(template: CompiledTemplate, row: Mapping[str, object], *, field: str) -> str | RowError:
    try:
        text = template.render(row)
    except Exception as error:
        return RowError(code=ErrorCode.TEMPLATE_ERROR, message=f"{field}: {type(error).__name__}: {error}")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{field}: the rendered text is not valid Unicode at character {error.start}"
        return RowError(code=ErrorCode.UNDECODABLE_TEXT, message=message)
    return text


def python_values(column: pa.ChunkedArray[Any]) -> list[object]:
    """A column as Python objects; an ``UnreadableValue`` where there is none (text that is not UTF-8, far dates)."""
    try:
        return column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException):
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: pa.Scalar[Any]) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return UnreadableValue(RowError(code=ErrorCode.UNDECODABLE_TEXT, message=f"not valid UTF-8: {error.reason}"))
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return UnreadableValue(RowError(code=ErrorCode.TEMPLATE_ERROR, message=f"unreadable value: {error}"))
