"""Prompts of a file as requests: JSON lines with ``turns`` or ``prompt``, or a column of a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark_batch.core import Message, Request, SamplingParams
from dspark_batch.errors import InputError


def read_prompts(path: Path, *, column: str = "prompt", system: str | None = None) -> list[Request]:
    """Requests with default sampling, ids "0", "1", ...; the first of ``turns`` is a chat, as is all with ``system``.

    Raises:
        InputError: the file is missing or empty, is no JSON lines or Parquet file, or a line or column is not there.
    """
    if not path.is_file():
        raise InputError(f"prompt file {path}: no such file")
    rows = _parquet_rows(path, column) if path.suffix == ".parquet" else _json_rows(path)
    out = []
    for number, (text, is_chat) in enumerate(rows):
        before = () if system is None else (Message("system", system),)
        if is_chat or before:
            out.append(Request(id=str(number), messages=(*before, Message("user", text))))
        else:
            out.append(Request(id=str(number), prompt=text))
    if not out:
        raise InputError(f"prompt file {path}: holds no prompts")
    return out


def with_sampling(requests: list[Request], sampling: SamplingParams, *, first: int, count: int) -> list[Request]:
    """``count`` requests from ``first`` on, going round; each with an id of its own."""
    numbers = range(first, first + count)
    return [replace(requests[number % len(requests)], id=str(number), sampling=sampling) for number in numbers]


def _json_rows(path: Path) -> Iterator[tuple[str, bool]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
            except ValueError as error:
                raise InputError(f"prompt file {path}, line {number}: is not JSON: {error}") from None
            if isinstance(row, Mapping) and row.get("turns"):
                yield str(row["turns"][0]), True
            elif isinstance(row, Mapping) and row.get("prompt"):
                yield str(row["prompt"]), False
            else:
                raise InputError(f"prompt file {path}, line {number}: has neither 'turns' nor 'prompt'")


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, bool]]:
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    if column not in names:
        raise InputError(
            f"prompt file {path}: has no column {column!r}; choose one with --column of {', '.join(names)}"
        )
    for value in pq.read_table(path, columns=[column]).column(column).to_pylist():
        if value is not None:
            yield str(value), False
