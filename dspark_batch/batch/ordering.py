"""The order in which the rows of a shard enter the engine. It decides speed only: rows come out in their own places."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_batch.core import Request, RowError

PREFIX_CHARS = 128
"""Rows that agree in this many characters, after what all rows have in common, are kept together."""


def feed_order(outcomes: Sequence[Request | RowError]) -> list[int]:
    """Indices in the order to feed them: rows that failed already, then groups of rows that share a prefix.

    Rows of a group follow one another, so that the engine computes their prefix once. The group with the longest prompt
    goes first, and within a group the longest prompt, so that the last rows to run are short. Equal lengths keep the
    order of the table.
    """
    failed = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, RowError)]
    keys = {index: _text_or_ids(row) for index, row in enumerate(outcomes) if isinstance(row, Request)}
    texts = [key for key in keys.values() if isinstance(key, str)]
    common = _shared_length(min(texts), max(texts)) if texts else 0
    groups: dict[str | tuple[int, ...], list[int]] = {}
    for index, key in keys.items():
        cut = (common if isinstance(key, str) else 0) + PREFIX_CHARS
        groups.setdefault(key[:cut], []).append(index)
    for members in groups.values():
        members.sort(key=lambda index: -len(keys[index]))
    ordered = sorted(groups.values(), key=lambda members: (-len(keys[members[0]]), members[0]))
    return failed + [index for members in ordered for index in members]


def _shared_length(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _text_or_ids(request: Request) -> str | tuple[int, ...]:
    """What the prompt begins with and how long it is: ready-made token ids, else the text of all turns."""
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    if request.prompt is not None:
        return request.prompt
    assert request.messages is not None
    turns = request.messages
    return turns[0].content if len(turns) == 1 else "\n".join([turn.content for turn in turns])
