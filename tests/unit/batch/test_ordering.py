from __future__ import annotations

import random

from dspark_batch.batch.ordering import PREFIX_CHARS, feed_order
from dspark_batch.core import ErrorCode, Message, Request, RowError


def text(prompt: str) -> Request:
    return Request(id="x", prompt=prompt)


def test_long_prompts_come_first_and_equal_lengths_keep_their_order():
    assert feed_order([text("aa"), text("b"), text("cccc"), text("dd")]) == [2, 0, 3, 1]


def test_rows_that_share_a_prefix_beyond_the_common_one_stay_together():
    head, first, second = "h" * 300, "1" * PREFIX_CHARS, "2" * PREFIX_CHARS
    rows = [text(head + first), text(head + second + "longest"), text(head + first + "x"), text(head + second)]
    assert feed_order(rows) == [1, 3, 2, 0]


def test_token_ids_and_chats_are_ordered_too():
    ids = [Request(id="x", prompt_token_ids=(1,)), Request(id="x", prompt_token_ids=(1, 2, 3))]
    assert feed_order(ids) == [1, 0]
    chats = [Request(id="x", messages=(Message("system", "s"), Message("user", "u" * n))) for n in (1, 3, 2)]
    assert feed_order(chats) == [1, 2, 0]


def test_every_row_is_fed_once_and_failed_rows_first():
    rng = random.Random(3)
    rows: list[Request | RowError] = [
        RowError(code=ErrorCode.NULL_PROMPT, message="") if rng.random() < 0.2 else text("p" * rng.randrange(1, 400))
        for _ in range(101)
    ]
    order = feed_order(rows)
    assert sorted(order) == list(range(101))
    num_failed = sum(isinstance(row, RowError) for row in rows)
    assert all(isinstance(rows[index], RowError) for index in order[:num_failed])
    assert feed_order([]) == []


def test_conversations_that_begin_alike_stay_together():
    def chat(*texts: str) -> Request:
        roles = ("user", "assistant") * 2
        return Request(id="x", messages=tuple(map(Message, roles, texts)))  # type: ignore[arg-type]

    first, second = "1" * PREFIX_CHARS, "2" * PREFIX_CHARS
    rows = [chat(first, "a", "b"), chat(second, "a", "longest"), chat(first, "a", "bc"), chat(second)]
    assert feed_order(rows) == [1, 3, 2, 0]
