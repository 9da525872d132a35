from __future__ import annotations

import pytest

from dspark_batch.batch.fingerprint import fingerprint_fields, run_fingerprint


def of(config, **rest) -> str:
    return run_fingerprint(config, **{"weights_fingerprint": "w", "input_digest": "i", **rest})


@pytest.mark.parametrize(
    "sections",
    [
        {"speculation": {"drafter": "none"}},
        {"speculation": {"drafter": "ngram", "schedule": "off", "max_draft_tokens": 3}},
        {"engine": {"backend": "local", "max_concurrency": 3, "threads": 1, "max_step_tokens": 64}},
        {"ray": {"actors": 4}},
        {"shards": {"rows": 7}},
        {"limits": {"max_failed_fraction": 1.0}},
        {"model": {"target": "elsewhere/same-weights"}},
        {"output": {"path": "elsewhere", "mode": "error"}},
    ],
)
def test_what_does_not_decide_the_output_is_not_covered_in_coupled_mode(make_config, sections):
    assert of(make_config()) == of(make_config(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        {"input": {"id": "key"}},
        {"input": {"filter": "n > 1"}},
        {"input": {"columns": ["text"]}},
        {"input": {"limit": 3}},
        {"prompt": {"template": "other {{ text }}"}},
        {"prompt": {"template": "Summarise: {{ text }}", "system": "s"}},
        {"prompt": {"template": "Summarise: {{ text }}", "chat_template_arguments": {"enable_thinking": False}}},
        {"prompt": {"messages": "text"}},
        {"task": "extract", "sampling": {"json_schema": {"type": "integer"}}},
        {"sampling": {"seed": 1}},
        {"sampling": {"stop": ["x"]}},
        {"output": {"column": "other"}},
        {"output": {"token_ids": True}},
        {"output": {"prefix": "p_"}},
        {"model": {"dtype": "float32"}},
        {"engine": {"max_context": 128}},
        {"speculation": {"verification": "token"}},
    ],
)
def test_what_decides_the_output_is_covered(make_config, sections):
    assert of(make_config()) != of(make_config(**sections))


def test_weights_dtype_and_input_content_are_covered(make_config):
    config = make_config()
    prints = {
        of(config),
        of(config, weights_fingerprint="v"),
        of(config, input_digest="j"),
        of(make_config(model={"dtype": "float32"})),
    }
    assert len(prints) == 4


@pytest.mark.parametrize("mode", ["token", "block"])
def test_in_the_other_modes_the_speculation_is_covered(make_config, mode):
    one = make_config(speculation={"verification": mode, "drafter": "ngram"})
    two = make_config(speculation={"verification": mode, "drafter": "suffix"})
    assert of(one) != of(two)
    assert fingerprint_fields(one, weights_fingerprint="w")["speculation.drafter"] == "ngram"


def test_a_run_without_newer_settings_keeps_the_fingerprint_that_it_had_before_there_were_any(make_config):
    fields = fingerprint_fields(make_config(), weights_fingerprint="w")
    assert "input.limit" not in fields
    prompt = {name for name in fields if name.startswith("prompt.")}
    assert prompt == {"prompt.system", "prompt.template", "prompt.token_ids", "prompt.nulls", "prompt.chat"}
    arguments = {"b": 1, "a": [True]}
    named = {"template": "{{ text }}", "chat_template_arguments": arguments}
    turned = {**named, "chat_template_arguments": dict(reversed(arguments.items()))}
    assert of(make_config(prompt=named)) == of(make_config(prompt=turned))


def test_the_order_of_a_schema_is_that_of_a_typed_columns_fields_and_covered_there_alone(make_config):
    properties = {"b": {"type": "integer"}, "a": {"type": "string"}}
    one = {"json_schema": {"type": "object", "properties": properties}}
    two = {"json_schema": {"type": "object", "properties": dict(reversed(properties.items()))}}
    assert of(make_config(sampling=one)) == of(make_config(sampling=two))
    typed = {of(make_config(task="extract", sampling=sampling)) for sampling in (one, two)}
    assert len({of(make_config(sampling=one)), *typed}) == 3
