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
