from __future__ import annotations

import random

import pyarrow as pa
import pytest

from dspark_batch.batch import templates
from dspark_batch.batch.prompts import PromptRenderer, prompt_columns
from dspark_batch.core import ErrorCode, Message, Request, RowError, SamplingParams
from dspark_batch.errors import ConfigError
from dspark_batch.job.config import PromptSection

SCHEMA = pa.schema([("text", pa.string()), ("title", pa.string()), ("ids", pa.list_(pa.int64()))])


def renderer(
    *, chat_template: bool = False, schema: pa.Schema = SCHEMA, use_fast_path: bool = True, **section
) -> PromptRenderer:
    return PromptRenderer(
        PromptSection(**section),
        sampling=SamplingParams(),
        input_schema=schema,
        has_chat_template=chat_template,
        use_fast_path=use_fast_path,
    )


SIMPLE_SECTIONS = [
    {"template": "Q: {{ text }}"},
    {"template": "{{ text }}"},
    {"template": "{{ title }} {{ text }}{{ title }}\n", "system": "Be brief."},
    {"template": "{{ text }}", "system": "{{ title }}"},
    {"template": "always the same", "system": "for {{ title }}"},
    {"template": "{{ text }}", "chat": "never", "system": "{% raw %}{{ x }}{% endraw %}"},
    {"template": "{{ text }}", "system": "{{ title | upper }}"},
    {"template": "{% if text %}{{ text }}{% endif %}"},
    {"template": "{{ row['title'] }} {{ text }}"},
    {"template": "{{ title }} {{ text }}", "nulls": "error"},
    {"template": "{{ text }}", "system": "{{ title }}", "nulls": "error"},
]


@pytest.mark.parametrize("section", SIMPLE_SECTIONS, ids=lambda section: section["template"])
@pytest.mark.parametrize("chat_template", [False, True])
def test_tables_rendered_by_column_give_the_requests_of_rendering_by_row(section, chat_template):
    rng = random.Random(str(section))
    fast = renderer(**section, chat_template=chat_template)
    slow = renderer(**section, chat_template=chat_template, use_fast_path=False)
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        for num_rows in (0, 1, 7, 61):
            values = [[rng.choice([None, "", "ä{{ x }}", "text"]) for _ in range(num_rows)] for _ in range(2)]
            table = pa.table({"text": pa.array(values[0], kind), "title": pa.array(values[1], kind)})
            pieces = pa.concat_tables([table.slice(0, 3), table.slice(3)])
            ids = tuple(f"r{row}" for row in range(num_rows))
            assert list(fast.render_table(pieces, ids=ids)) == list(slow.render_table(pieces, ids=ids))


def test_one_prompt_that_is_too_long_fails_alone_in_a_table_of_text(monkeypatch):
    monkeypatch.setattr(templates, "MAX_PROMPT_CHARS", 20)
    table = pa.table({"text": ["short", "x" * 30, "short too"]})
    outcomes = list(renderer(template="{{ text }}").render_table(table, ids=("1", "2", "3")))
    assert [isinstance(outcome, Request) for outcome in outcomes] == [True, False, True]
    assert code(outcomes[1]) is ErrorCode.TEMPLATE_ERROR


def code(outcome: Request | RowError) -> ErrorCode:
    assert isinstance(outcome, RowError), outcome
    return outcome.code


def test_without_a_chat_template_the_system_text_comes_before_the_prompt():
    made = renderer(system="Be brief.", template="Q: {{ text }}\n").render({"text": "why"}, row_id="7")
    assert made == Request(id="7", prompt="Be brief.\n\nQ: why\n", sampling=SamplingParams())


def test_with_a_chat_template_system_and_template_become_messages():
    made = renderer(system="For {{ title }}", template="{{ text }}", chat_template=True)
    request = made.render({"text": "why", "title": "T"}, row_id="7")
    assert isinstance(request, Request)
    assert request.messages == (Message("system", "For T"), Message("user", "why"))


def test_chat_never_gives_raw_text_and_always_needs_a_template_in_the_model():
    made = renderer(template="{{ text }}", chat="never", chat_template=True).render({"text": "a"}, row_id="1")
    assert isinstance(made, Request)
    assert made.prompt == "a"
    with pytest.raises(ConfigError, match=r"prompt\.chat: .*no chat template"):
        renderer(template="{{ text }}", chat="always")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text", "does not parse"),
        ("{% for x in text %}", "does not parse"),
        ("{{ text | nosuchfilter }}", "does not parse"),
        ("{{ body }}", "no column 'body'; its columns are: text, title, ids"),
    ],
)
def test_templates_are_checked_before_the_first_row(template, message):
    with pytest.raises(ConfigError, match=message) as caught:
        renderer(template=template)
    assert caught.value.problems[0].field == "prompt.template"


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        renderer(template="{{ body }} {{ head }}", system="{{ text")
    assert [problem.field for problem in caught.value.problems] == [
        "prompt.template",
        "prompt.template",
        "prompt.system",
    ]


def test_names_that_a_template_sets_itself_are_not_columns():
    section = PromptSection(
        template="{% set n = 2 %}{% for i in range(n) %}{{ i }}{{ loop.index }}{% endfor %}{{ text }}"
    )
    assert prompt_columns(section) == ("text",)


def test_null_fails_the_row_only_where_all_template_columns_are_null():
    made = renderer(template="{{ title or '-' }}: {{ text }}")
    assert code(made.render({"text": None, "title": None}, row_id="1")) is ErrorCode.NULL_PROMPT
    assert isinstance(made.render({"text": None, "title": "t"}, row_id="1"), Request)
    assert code(renderer(template="{{ text }}").render({"text": None}, row_id="1")) is ErrorCode.NULL_PROMPT


@pytest.mark.parametrize("use_fast_path", [True, False])
def test_a_null_beside_other_values_is_an_empty_text_or_fails_the_row(use_fast_path):
    table = pa.table({"text": ["a", "b", None], "title": ["t", None, "t"]})
    section = {"template": "{{ text }}", "system": "For {{ title }}", "use_fast_path": use_fast_path}
    shown = list(renderer(**section).render_table(table, ids=("1", "2", "3")))
    assert [made.prompt for made in shown if isinstance(made, Request)] == ["For t\n\na", "For \n\nb"]
    strict = list(renderer(**section, nulls="error").render_table(table, ids=("1", "2", "3")))
    assert [made.message for made in strict if isinstance(made, RowError)] == [
        "NULL in column title",
        "NULL in column text",
    ]
    assert isinstance(strict[0], Request)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ text.nosuch }}", "UndefinedError"),
        ("{{ 1 / (text | length - 1) }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}x{% endfor %}{{ text }}", "OverflowError"),
        ("{{ text.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_on_a_row_is_a_row_error(template, reason):
    made = renderer(template=template).render({"text": "x"}, row_id="1")
    assert code(made) is ErrorCode.TEMPLATE_ERROR
    assert reason in made.message


def test_an_error_in_the_system_text_names_it():
    made = renderer(template="{{ text }}", system="{{ title.x }}").render({"text": "x", "title": "t"}, row_id="1")
    assert code(made) is ErrorCode.TEMPLATE_ERROR
    assert "prompt.system" in made.message


def test_lone_surrogates_and_bytes_that_are_not_utf8_are_undecodable():
    assert code(renderer(template="{{ '\\ud800' }}{{ text }}").render({"text": "x"}, row_id="1")) is (
        ErrorCode.UNDECODABLE_TEXT
    )
    raw = pa.array([b"a", b"\xff\xfe", b"c"]).buffers()
    broken = pa.Array.from_buffers(pa.string(), 3, raw)
    outcomes = list(renderer(template="{{ text }}").render_table(pa.table({"text": broken}), ids=("1", "2", "3")))
    assert [isinstance(outcome, Request) for outcome in outcomes] == [True, False, True]
    assert code(outcomes[1]) is ErrorCode.UNDECODABLE_TEXT


def test_an_empty_prompt_is_a_row_error():
    assert code(renderer(template="{{ text }}").render({"text": ""}, row_id="1")) is ErrorCode.EMPTY_PROMPT


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ErrorCode.NULL_PROMPT),
        ([], ErrorCode.EMPTY_PROMPT),
        ([1, -2], ErrorCode.INVALID_TOKEN_IDS),
        ([1, None], ErrorCode.INVALID_TOKEN_IDS),
        ([2**31], ErrorCode.INVALID_TOKEN_IDS),
    ],
)
def test_bad_token_ids_are_row_errors(value, expected):
    assert code(renderer(token_ids="ids").render({"ids": value}, row_id="1")) is expected


def test_token_ids_become_the_prompt():
    made = renderer(token_ids="ids").render({"ids": [5, 6]}, row_id="1")
    assert isinstance(made, Request)
    assert made.prompt_token_ids == (5, 6)


def test_a_token_id_column_must_be_a_list_of_integers():
    with pytest.raises(ConfigError, match=r"prompt\.token_ids: column 'text' has type string"):
        renderer(token_ids="text")
