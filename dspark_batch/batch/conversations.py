"""Conversations of a column, as lists of structs or as JSON text, to the messages of a request."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from dspark_batch.batch.schema import is_list, missing_columns
from dspark_batch.batch.templates import MAX_PROMPT_CHARS, is_unicode
from dspark_batch.core import ErrorCode, Message, RowError
from dspark_batch.errors import Problem

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a table calls the parts of a message, and the roles."""

    role: str
    content: str
    roles: Mapping[str, Role]

    @property
    def fields(self) -> tuple[str, str]:
        return self.role, self.content


OPENAI = Layout("role", "content", {"system": "system", "user": "user", "assistant": "assistant"})
SHAREGPT = Layout("from", "value", {**OPENAI.roles, "human": "user", "gpt": "assistant", "chatgpt": "assistant"})


def check_messages(name: str, *, schema: pa.Schema) -> list[Problem]:
    """Problems with ``prompt.messages``: a column that is missing or whose type holds no conversations."""
    problems = missing_columns("prompt.messages", [name], schema=schema)
    if problems:
        return problems
    kind = schema.field(name).type
    if _is_text(kind) or (is_list(kind) and _is_message(kind.value_type)):
        return []
    message = (
        f"column {name!r} has type {kind}; it must be a list of structs with the texts role and content, or from and "
        "value, or the same as JSON text"
    )
    return [Problem("prompt.messages", message)]


def messages_of(value: object, *, column: str) -> tuple[Message, ...] | RowError:
    """The messages of one row, whose value is not NULL, or why it has none.

    Fields other than those of its layout are ignored.
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
    messages = tuple([_message(message) for message in value])
    return _text_problem(messages, column=column) or messages


def _problem(message: Any) -> str | None:
    if message is None:
        return "is NULL"
    if not isinstance(message, dict):
        return f"must have {' and '.join(OPENAI.fields)}, got {reprlib.repr(message)}"
    layout = _layout(message)
    for name in layout.fields:
        text = message.get(name)
        if text is None:
            return f"{name} is NULL" if name in message else f"{name} is missing"
        if not isinstance(text, str):
            return f"{name} must be text, got {reprlib.repr(text)}"
    role = message[layout.role]
    if role not in layout.roles:
        return f"{layout.role} must be one of {', '.join(layout.roles)}, got {reprlib.repr(role)}"
    return None


def _message(message: Mapping[str, str]) -> Message:
    layout = _layout(message)
    return Message(layout.roles[message[layout.role]], message[layout.content])


def _layout(message: Mapping[str, Any]) -> Layout:
    """That of the message's fields; those of the other are missing, or NULL where a column has both kinds."""
    is_openai = any(message.get(name) is not None for name in OPENAI.fields)
    return SHAREGPT if SHAREGPT.role in message and not is_openai else OPENAI


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
    return isinstance(kind, pa.StructType) and any(
        all(kind.get_field_index(name) >= 0 and _is_text(kind.field(name).type) for name in layout.fields)
        for layout in (OPENAI, SHAREGPT)
    )


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))
