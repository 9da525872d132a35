"""Conversations of a column, as lists of structs or as JSON text, to the messages of a request."""

from __future__ import annotations

import json
import reprlib
from typing import Any

import pyarrow as pa

from dspark_batch.batch.schema import is_list, missing_columns
from dspark_batch.batch.templates import MAX_PROMPT_CHARS, is_unicode
from dspark_batch.core import ErrorCode, Message, RowError
from dspark_batch.errors import Problem

FIELDS = ("role", "content")
ROLES = ("system", "user", "assistant")


def check_messages(name: str, *, schema: pa.Schema) -> list[Problem]:
    """Problems with ``prompt.messages``: a column that is missing or whose type holds no conversations."""
    problems = missing_columns("prompt.messages", [name], schema=schema)
    if problems:
        return problems
    kind = schema.field(name).type
    if _is_text(kind) or (is_list(kind) and _is_message(kind.value_type)):
        return []
    message = (
        f"column {name!r} has type {kind}; it must be a list of structs with the texts role and content, or the same "
        "as JSON text"
    )
    return [Problem("prompt.messages", message)]


def messages_of(value: object, *, column: str) -> tuple[Message, ...] | RowError:
    """The messages of one row, whose value is not NULL, or why it has none.

    Fields other than role and content are ignored.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            return _invalid(f"column {column} is not JSON: {error}")
    if not isinstance(value, list):
        return _invalid(f"column {column} must hold a list of messages, got {reprlib.repr(value)}")
    if not value:
        return RowError(code=ErrorCode.EMPTY_PROMPT, message=f"no messages in column {column}")
    for place, message in enumerate(value):
        problem = _problem(message)
        if problem is not None:
            return _invalid(f"column {column}, message {place} (counted from 0): {problem}")
    messages = tuple([Message(message["role"], message["content"]) for message in value])
    return _text_problem(messages, column=column) or messages


def _problem(message: Any) -> str | None:
    if message is None:
        return "is NULL"
    if not isinstance(message, dict):
        return f"must have {' and '.join(FIELDS)}, got {reprlib.repr(message)}"
    for name in FIELDS:
        text = message.get(name)
        if text is None:
            return f"{name} is NULL" if name in message else f"{name} is missing"
        if not isinstance(text, str):
            return f"{name} must be text, got {reprlib.repr(text)}"
    if message["role"] not in ROLES:
        return f"role must be one of {', '.join(ROLES)}, got {reprlib.repr(message['role'])}"
    return None


def _text_problem(messages: tuple[Message, ...], *, column: str) -> RowError | None:
    last = messages[-1]
    if last.role == "assistant":
        return _invalid(f"column {column}: the last message is the assistant's, so nothing is left to answer")
    if not last.content:
        return RowError(code=ErrorCode.EMPTY_PROMPT, message=f"column {column}: the last message is empty")
    if sum(len(message.content) for message in messages) > MAX_PROMPT_CHARS:
        text = f"column {column}: the conversation has more than {MAX_PROMPT_CHARS} characters"
        return RowError(code=ErrorCode.PROMPT_TOO_LONG, message=text)
    if not all(is_unicode(message.content) for message in messages):
        text = f"column {column}: a message is not valid Unicode"
        return RowError(code=ErrorCode.UNDECODABLE_TEXT, message=text)
    return None


def _invalid(message: str) -> RowError:
    return RowError(code=ErrorCode.INVALID_MESSAGES, message=message)


def _is_message(kind: pa.DataType) -> bool:
    """Also NULL, which is all that a file with empty conversations alone holds."""
    if pa.types.is_null(kind):
        return True
    return isinstance(kind, pa.StructType) and all(
        kind.get_field_index(name) >= 0 and _is_text(kind.field(name).type) for name in FIELDS
    )


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))
