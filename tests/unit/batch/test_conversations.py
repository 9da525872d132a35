from __future__ import annotations

import json

import pyarrow as pa
import pytest

from dspark_batch.batch import conversations
from dspark_batch.batch.prompts import PromptRenderer, prompt_columns
from dspark_batch.core import ErrorCode, Message, Request, RowError, SamplingParams
from dspark_batch.errors import ConfigError
from dspark_batch.job.config import PromptSection

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema([("talk", MESSAGES), ("text", pa.string()), ("title", pa.string())])
USER = {"role": "user", "content": "why"}
SYSTEM = {"role": "system", "content": "Rhyme."}
ASSISTANT = {"role": "assistant", "content": "so"}


def renderer(*, chat_template: bool = True, schema: pa.Schema = SCHEMA, **section) -> PromptRenderer:
    return PromptRenderer(
        PromptSection(**{"messages": "talk", **section}),
        sampling=SamplingParams(),
        input_schema=schema,
        has_chat_template=chat_template,
    )


def rendered(value: object, *, title: str | None = None, **section) -> Request | RowError:
    return renderer(**section).render({"talk": value, "title": title}, row_id="1")


def turns(outcome: Request | RowError) -> list[tuple[str, str]]:
    assert isinstance(outcome, Request), outcome
    assert outcome.messages is not None
    return [(message.role, message.content) for message in outcome.messages]


def error(outcome: Request | RowError) -> RowError:
    assert isinstance(outcome, RowError), outcome
    return outcome


def test_a_conversation_becomes_the_messages_of_the_request():
    made = rendered([SYSTEM, USER, ASSISTANT, {**USER, "content": "and then"}])
    assert turns(made) == [("system", "Rhyme."), ("user", "why"), ("assistant", "so"), ("user", "and then")]
    assert prompt_columns(PromptSection(messages="talk", system="For {{ title }}")) == ("talk", "title")


def test_the_system_text_goes_before_conversations_without_a_system_message_of_their_own():
    section = {"system": "For {{ title }}"}
    assert turns(rendered([USER], title="T", **section)) == [("system", "For T"), ("user", "why")]
    assert turns(rendered([SYSTEM, USER], title="T", **section)) == [("system", "Rhyme."), ("user", "why")]
    assert turns(rendered([USER], title=None, system="{{ title }}")) == [("user", "why")]
    assert "prompt.system" in error(rendered([USER], title="T", system="{{ title.x }}")).message


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        (None, ErrorCode.NULL_PROMPT, "NULL in column talk"),
        ([], ErrorCode.EMPTY_PROMPT, "no messages in column talk"),
        ([{"role": "user", "content": ""}], ErrorCode.EMPTY_PROMPT, "the last message is empty"),
        ([USER, None], ErrorCode.INVALID_MESSAGES, "message 1 (counted from 0): is NULL"),
        ([{"role": None, "content": "x"}], ErrorCode.INVALID_MESSAGES, "message 0 (counted from 0): role is NULL"),
        ([USER, {"role": "user", "content": None}], ErrorCode.INVALID_MESSAGES, "content is NULL"),
        ([{"role": "human", "content": "x"}], ErrorCode.INVALID_MESSAGES, "system, user, assistant, got 'human'"),
        ([USER, ASSISTANT], ErrorCode.INVALID_MESSAGES, "the last message is the assistant's"),
        ([{"role": "user", "content": "\ud800"}], ErrorCode.UNDECODABLE_TEXT, "not valid Unicode"),
    ],
)
def test_a_row_without_an_answerable_conversation_fails_alone(value, code, message):
    failed = error(rendered(value))
    assert failed.code is code
    assert message in failed.message
    assert "talk" in failed.message


def test_with_nulls_error_a_null_in_the_system_text_fails_the_row_too():
    assert turns(rendered([USER], title=None, system="For {{ title }}"))[0] == ("system", "For ")
    failed = error(rendered([USER], title=None, system="For {{ title }}", nulls="error"))
    assert (failed.code, failed.message) == (ErrorCode.NULL_PROMPT, "NULL in column title")


def test_a_conversation_that_no_model_could_read_is_too_long(monkeypatch):
    monkeypatch.setattr(conversations, "MAX_PROMPT_CHARS", 20)
    assert isinstance(rendered([{"role": "user", "content": "x" * 20}]), Request)
    assert error(rendered([{"role": "user", "content": "x" * 11}] * 2)).code is ErrorCode.PROMPT_TOO_LONG


@pytest.mark.parametrize(
    "kind",
    [
        MESSAGES,
        pa.large_list(pa.struct([("content", pa.large_string()), ("role", pa.dictionary(pa.int32(), pa.string()))])),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.string()))])),
    ],
    ids=["plain", "large", "more_fields"],
)
def test_columns_of_structs_give_their_roles_and_contents_and_other_fields_are_ignored(kind):
    values = [[SYSTEM, USER], None, [], [USER]]
    filled = [value and [{**kept, "tool_calls": ["f"]} for kept in value] for value in values]
    table = pa.table({"talk": pa.array(filled if "tool_calls" in str(kind) else values, kind)})
    outcomes = list(renderer(schema=table.schema).render_table(table, ids=("1", "2", "3", "4")))
    assert turns(outcomes[0]) == [("system", "Rhyme."), ("user", "why")]
    assert [error(outcome).code for outcome in outcomes[1:3]] == [ErrorCode.NULL_PROMPT, ErrorCode.EMPTY_PROMPT]
    assert isinstance(outcomes[3], Request)
    assert outcomes[3].id == "4"


def test_a_file_with_nothing_but_empty_conversations_is_read():
    table = pa.table({"talk": [[], [None], None]})
    outcomes = list(renderer(schema=table.schema).render_table(table, ids=("1", "2", "3")))
    assert [error(outcome).code for outcome in outcomes] == [
        ErrorCode.EMPTY_PROMPT,
        ErrorCode.INVALID_MESSAGES,
        ErrorCode.NULL_PROMPT,
    ]


def test_bytes_that_are_not_utf8_fail_their_conversation_alone():
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"c"]).buffers())
    structs = pa.StructArray.from_arrays([pa.array(["user"] * 3), texts], names=["role", "content"])
    table = pa.table({"talk": pa.ListArray.from_arrays([0, 1, 2, 3], structs)})
    outcomes = list(renderer(schema=table.schema).render_table(table, ids=("1", "2", "3")))
    assert [turns(outcomes[place]) for place in (0, 2)] == [[("user", "a")], [("user", "c")]]
    assert error(outcomes[1]).code is ErrorCode.UNDECODABLE_TEXT


def test_a_text_column_holds_conversations_as_json():
    made = renderer(messages="text")
    good = made.render({"text": json.dumps([{**USER, "name": "ann"}])}, row_id="1")
    assert turns(good) == [("user", "why")]
    for text, code, message in [
        ("why", ErrorCode.INVALID_MESSAGES, "is not JSON"),
        ("[" * 100_000, ErrorCode.INVALID_MESSAGES, "is not JSON"),
        ('{"role": "user"}', ErrorCode.INVALID_MESSAGES, "must hold a list of messages"),
        ('["why"]', ErrorCode.INVALID_MESSAGES, "must have role and content, got 'why'"),
        ('[{"role": "user"}]', ErrorCode.INVALID_MESSAGES, "content is missing"),
        ('[{"role": "user", "content": null}]', ErrorCode.INVALID_MESSAGES, "content is NULL"),
        ('[{"role": "user", "content": ["a"]}]', ErrorCode.INVALID_MESSAGES, "content must be text, got ['a']"),
        (json.dumps([{"role": "user", "content": "\udfff"}]), ErrorCode.UNDECODABLE_TEXT, "not valid Unicode"),
        ("[]", ErrorCode.EMPTY_PROMPT, "no messages"),
        (" ", ErrorCode.EMPTY_PROMPT, "no messages"),
    ]:
        failed = error(made.render({"text": text}, row_id="1"))
        assert failed.code is code
        assert message in failed.message


SHAREGPT = [
    {"from": "system", "value": "Rhyme."},
    {"from": "human", "value": "why"},
    {"from": "gpt", "value": "so"},
    {"from": "user", "value": "and then"},
]


def test_conversations_of_sharegpt_are_taken_too_as_structs_and_as_json():
    expected = [("system", "Rhyme."), ("user", "why"), ("assistant", "so"), ("user", "and then")]
    table = pa.table({"talk": [SHAREGPT], "text": [json.dumps(SHAREGPT)]})
    for column in ("talk", "text"):
        made = renderer(schema=table.schema, messages=column)
        assert turns(next(made.render_table(table, ids=("1",)))) == expected


def test_a_column_may_hold_messages_of_both_kinds():
    table = pa.table({"talk": [[*SHAREGPT[1:3], USER]]})
    (outcome,) = renderer(schema=table.schema).render_table(table, ids=("1",))
    assert turns(outcome) == [("user", "why"), ("assistant", "so"), ("user", "why")]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"from": "tool", "value": "x"},
            "from must be one of system, user, assistant, human, gpt, chatgpt, got 'tool'",
        ),
        ({"from": "human"}, "value is missing"),
        ({"from": None, "value": "x"}, "from is NULL"),
        ({"from": "human", "value": 3}, "value must be text, got 3"),
        ({"from": "human", "value": "x", "role": "human", "content": "x"}, "role must be one of"),
    ],
)
def test_a_wrong_message_of_sharegpt_fails_its_row(message, problem):
    failed = error(rendered([SHAREGPT[1], message]))
    assert failed.code is ErrorCode.INVALID_MESSAGES
    assert f"message 1 (counted from 0): {problem}" in failed.message


@pytest.mark.parametrize(
    "kind",
    [
        pa.int64(),
        pa.list_(pa.string()),
        pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))]),
        pa.list_(pa.struct([("from", pa.string()), ("content", pa.string())])),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(pa.string()))])),
    ],
    ids=str,
)
def test_a_column_of_another_type_is_refused_before_the_first_row(kind):
    with pytest.raises(ConfigError, match=r"prompt\.messages: column 'talk' has type .* must be a list of structs"):
        renderer(schema=pa.schema([("talk", kind)]))


def test_a_missing_column_and_a_model_without_a_chat_template_are_refused():
    with pytest.raises(ConfigError, match=r"prompt\.messages: the input has no column 'talks'"):
        renderer(messages="talks")
    with pytest.raises(ConfigError, match=r"prompt\.messages: needs a chat template") as caught:
        renderer(chat_template=False, chat="always", chat_template_arguments={"a": 1})
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["prompt.messages", "prompt.chat", "prompt.chat_template_arguments"]


@pytest.mark.parametrize("use_fast_path", [True, False])
def test_arguments_of_the_chat_template_go_with_every_chat(use_fast_path):
    arguments = {"enable_thinking": False, "words": ["a", None]}
    section = PromptSection(template="{{ text }}", system="{{ title }}", chat_template_arguments=arguments)
    made = PromptRenderer(
        section,
        sampling=SamplingParams(),
        input_schema=SCHEMA,
        has_chat_template=True,
        use_fast_path=use_fast_path,
    )
    table = pa.table({"text": ["a", "b"], "title": ["t", None]})
    expected = {"messages": (Message("system", "t"), Message("user", "a")), "chat_template_arguments": arguments}
    assert next(made.render_table(table, ids=("1", "2"))) == Request(id="1", **expected)
    talk = rendered([USER], chat_template_arguments=arguments)
    assert isinstance(talk, Request)
    assert talk.chat_template_arguments == arguments
