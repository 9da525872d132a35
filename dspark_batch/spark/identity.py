"""The identity of a DataFrame's rows. It keys their random draws, so it never depends on partition or place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from dspark_batch.batch.prompts import PromptRenderer
from dspark_batch.batch.rows import text_values
from dspark_batch.core import Request, RowError, SamplingParams
from dspark_batch.job.config import PromptSection

CONTENT_PREFIX = "content:"


class RowIdentity:
    """Gives every row of a table its id.

    With an id column: its value as text, by the same rule as files on disk follow, so that the texts are the same.
    Where there is none, or its value is NULL: ``content:`` and a hash of the rendered prompt. Rows with equal prompts
    then share their draw and get equal texts, wherever they stand.

    Raises:
        ConfigError: the prompt does not fit the schema.
    """

    def __init__(self, section: PromptSection, *, id_column: str | None, input_schema: pa.Schema) -> None:
        self._id_column = id_column
        self._renderer = PromptRenderer(
            section.model_copy(update={"chat": "never"}),
            sampling=SamplingParams(),
            input_schema=input_schema,
            has_chat_template=True,
        )

    def of(self, table: pa.Table) -> list[str]:
        """The id of every row."""
        if self._id_column is None:
            return self._by_content(table)
        texts = text_values(_in_utc(table.column(self._id_column)).cast(pa.large_string()))
        if None not in texts:
            return [text for text in texts if text is not None]
        contents = self._by_content(table)
        return [content if text is None else text for text, content in zip(texts, contents, strict=True)]

    def _by_content(self, table: pa.Table) -> list[str]:
        nobody = ("",) * table.num_rows
        return [CONTENT_PREFIX + _digest(_parts(outcome)) for outcome in self._renderer.render_table(table, ids=nobody)]


def _parts(outcome: Request | RowError) -> Sequence[str]:
    if isinstance(outcome, RowError):
        return ("error", outcome.code.value)
    if outcome.prompt is not None:
        return ("text", outcome.prompt)
    if outcome.messages is not None:
        return ("messages", *(text for turn in outcome.messages for text in (turn.role, turn.content)))
    assert outcome.prompt_token_ids is not None
    return ("token_ids", *map(str, outcome.prompt_token_ids))


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _in_utc(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """Times as Spark hands them over carry the session's zone; their text must not depend on it."""
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return column.cast(pa.timestamp(kind.unit, tz="UTC"))
    return column
