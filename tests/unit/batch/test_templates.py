from __future__ import annotations

import random

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from dspark_batch.batch import templates
from dspark_batch.batch.templates import CompiledTemplate, TooLongError


@pytest.mark.parametrize(
    "text",
    [
        "{{ a }}",
        "plain",
        "x {{ a }}{{ b }}\n{{ a }} y\n",
        "{{- a -}} {{ b }} ",
        "{# note #}{{ b }}ß",
        "{{ a ~ b }}",
        "{% if a %}{{ a }}{% endif %}{{ b }}",
        "{% raw %}{{ a }}{% endraw %}{{ b }}",
        "{% set a = 3 %}{{ a }}{{ b }}",
        "{{ row['a'] }}{{ row['b'] }}!{{ b }}",
        "{% for row in [a, b] %}{{ row }}{% endfor %}",
    ],
)
def test_the_fast_path_gives_the_text_of_jinja(text):
    rng = random.Random(5)
    values = [None, True, 0, -3, 1.5, "", "ä{{ b }}", "<&>", [1, "x"], {"k": None}, b"raw"]
    fast, slow = CompiledTemplate(text), CompiledTemplate(text, use_fast_path=False)
    assert fast.columns == slow.columns
    for _ in range(40):
        row = {"a": rng.choice(values), "b": rng.choice(values)}
        assert fast.render(row) == slow.render(row)


def test_columns_are_those_that_the_template_reads():
    assert CompiledTemplate("{{ b }}{% for x in a %}{{ x }}{{ range(2) }}{% endfor %}").columns == ("a", "b")


@pytest.mark.parametrize("use_fast_path", [True, False])
@pytest.mark.parametrize("name", ["namespace", "range", "dict", "cycler", "joiner", "lipsum"])
def test_a_column_wins_over_a_function_of_its_name(name, use_fast_path):
    for text, shown in (("{{ %s }}", "v"), ("{{ %s | upper }}", "V")):
        template = CompiledTemplate(text % name, use_fast_path=use_fast_path)
        assert template.columns == (name,)
        assert template.render({name: "v"}) == shown
    called = CompiledTemplate("{{ range(2) | list }}{{ dict(a=1).a }}{{ a }}", use_fast_path=use_fast_path)
    assert (called.columns, called.render({"a": "v"})) == (("a",), "[0, 1]1v")


def test_a_column_called_self_is_a_subscript_of_the_row():
    with pytest.raises(jinja2.TemplateSyntaxError, match=r'row\["self"\]'):
        CompiledTemplate("{{ self }}")
    assert CompiledTemplate("{{ row['self'] }}").render({"self": "v"}) == "v"
    assert CompiledTemplate("{% block a %}x{% endblock %}{{ self.a() }}").render({}) == "xx"


@pytest.mark.parametrize("use_fast_path", [True, False])
def test_columns_of_any_name_are_subscripts_of_the_row(use_fast_path):
    text = "{{ row['Review Text'] }}/{{ row[\"größe\"] }}/{{ n }}{% if row['is \\'on\\''] %}!{% endif %}"
    for text_of, shown in ((text, "a/b/3!"), (text.partition("{%")[0], "a/b/3")):
        template = CompiledTemplate(text_of, use_fast_path=use_fast_path)
        row = {"Review Text": "a", "größe": "b", "n": 3, "is 'on'": True}
        assert set(template.columns) <= set(row)
        assert template.render(row) == shown
    assert CompiledTemplate("{{ row['self'] }}{{ row['row'] }}").columns == ("row", "self")


def test_a_variable_called_row_is_what_the_template_makes_it():
    assert CompiledTemplate("{{ row }}{{ row.a }}").columns == ("row",)
    looped = CompiledTemplate("{% for row in rows %}{{ row['a'] }}{{ row[n] }}{% endfor %}")
    assert looped.columns == ("n", "rows")
    assert looped.render({"rows": [{"a": 1, "b": 2}, {"a": 3, "b": 4}], "n": "b"}) == "1234"


@pytest.mark.parametrize(
    "text", ["{{ row[name] }}", "{{ row['a'] }}{{ row['a' ~ n] }}", "{{ row[0] }}", "{{ row }}{{ row['a'] }}"]
)
def test_a_column_of_the_row_whose_name_is_computed_is_refused(text):
    with pytest.raises(jinja2.TemplateSyntaxError, match="takes the name of a column in quotes"):
        CompiledTemplate(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{{ a }}-{{ b }}", "-x"),
        ("{{ row['a'] }}-{{ b }}", "-x"),
        ("{{ a ~ '-' ~ b }}", "-x"),
        ("{{ a | upper }}-{{ a | trim }}{{ b | upper }}", "-X"),
        ("{{ [a, b] | join('-') }}", "-x"),
        ("{{ 'none' if a is none else a }}-{{ a or b }}", "none-x"),
        ("{{ a | default('d', true) }}-{{ b | default('d', true) }}", "d-x"),
        ("{% filter upper %}{{ a }}{{ b }}{% endfilter %}", "X"),
    ],
)
def test_null_is_an_empty_text_where_it_becomes_text_and_none_in_conditions(text, shown):
    assert CompiledTemplate(text).render({"a": None, "b": "x"}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "{{ 10 ** (10 ** 10) }}",
        "{{ a ** (10 ** 9) }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 12 * [1] }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_arithmetic_that_would_not_end_is_refused_at_once(text):
    with pytest.raises((SecurityError, OverflowError)):
        CompiledTemplate(text).render({"a": 7})


def test_small_arithmetic_is_fine():
    assert CompiledTemplate("{{ 2 ** 10 }} {{ 'ab' * 3 }} {{ 7 % 4 }} {{ 2.5 ** 2 }} {{ 2 ** -1 }}").render({}) == (
        "1024 ababab 3 6.25 0.5"
    )


@pytest.mark.parametrize("text", ["{{ a }}{{ a }}", "{% for x in range(1000) %}{{ a }}{% endfor %}"])
def test_the_length_of_a_prompt_is_bounded(text, monkeypatch):
    monkeypatch.setattr(templates, "MAX_PROMPT_CHARS", 100)
    with pytest.raises(TooLongError, match="more than 100 characters"):
        CompiledTemplate(text).render({"a": "x" * 60})


def test_a_text_that_does_not_parse_raises_the_error_of_jinja():
    with pytest.raises(jinja2.TemplateSyntaxError):
        CompiledTemplate("{{ a")
