from __future__ import annotations

from pathlib import Path

import pytest

from dspark_batch.batch.templates import CompiledTemplate
from dspark_batch.errors import ConfigError
from dspark_batch.spark.jobs import engine_job, prompt_template, resolve_column_config, resolve_config

MINIMAL = {"prompt": {"template": "Say {{ body }}"}}


def fields(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return [problem.field for problem in error.value.problems]


def test_a_dataframe_job_needs_neither_input_nor_output() -> None:
    job = resolve_config(MINIMAL, id="key", column="answer", overrides=["sampling.seed=3"])
    assert (job.input.id, job.output.column, job.sampling.seed) == ("key", "answer", 3)


def test_the_same_job_comes_out_of_a_file_a_mapping_and_a_config(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("prompt: {template: 'Say {{ body }}'}\nsampling: {seed: 4}\n")
    job = resolve_config(file)
    assert resolve_config({**MINIMAL, "sampling": {"seed": 4}}) == job
    assert resolve_config(job) == job
    assert resolve_config(str(file)) == job


def test_the_callers_mapping_is_left_alone() -> None:
    values = {"prompt": {"template": "x {{ body }}"}, "input": {"id": "a"}, "output": {}}
    resolve_config(values, prompt="y {{ body }}", id="b", column="c", overrides=["sampling.seed=1"])
    assert values == {"prompt": {"template": "x {{ body }}"}, "input": {"id": "a"}, "output": {}}


def test_the_arguments_prompt_replaces_the_configs_and_keeps_its_system_text() -> None:
    job = resolve_config({"prompt": {"system": "Be brief.", "token_ids": None}}, prompt="{{ body }}!")
    assert (job.prompt.system, job.prompt.template) == ("Be brief.", "{{ body }}!")
    job = resolve_config({"prompt": {"token_ids": "ids"}}, prompt="{{ body }}")
    assert job.prompt.token_ids is None
    assert resolve_config({"prompt": {"messages": "talk"}}, prompt="{{ body }}").prompt.messages is None


def test_a_prompt_is_a_template_or_a_column() -> None:
    assert prompt_template("a {{ b }}", []) == "a {{ b }}"
    assert prompt_template("{% if b %}x{% endif %}", []) == "{% if b %}x{% endif %}"
    for name in ("body", "my text", "range", "none", 'it\'s "größe" \\ 😀'):
        template = CompiledTemplate(prompt_template(name, ["id", name]))
        assert (template.columns, template.render({name: "shown"})) == ((name,), "shown")
    with pytest.raises(ConfigError, match=r"neither a template .* nor a column; the columns are: id, body"):
        prompt_template("text", ["id", "body"])


def test_problems_are_listed_together_and_name_their_source(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("prompt: {template: x}\nsampling: {temperature: -1}\nmodle: {}\n")
    with pytest.raises(ConfigError) as error:
        resolve_config(file)
    assert set(fields(error)) == {"sampling.temperature", "modle"}
    assert str(file) in str(error.value)


def test_what_only_files_have_is_refused_rather_than_ignored() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_config({**MINIMAL, "input": {"filter": "stars > 3", "incremental": "files"}})
    assert fields(error) == ["input.filter", "input.incremental"]


def test_a_function_takes_its_prompt_as_it_stands() -> None:
    job = resolve_column_config({"prompt": {"system": "Be brief."}})
    assert (job.prompt.template, job.prompt.system, job.output.column) == ("{{ prompt }}", "Be brief.", "text")
    assert resolve_column_config({"prompt": {"template": "Say {{ prompt }}"}}).prompt.template == "Say {{ prompt }}"


def test_a_functions_prompt_may_be_a_conversation() -> None:
    job = resolve_column_config({"prompt": {"messages": "prompt", "chat_template_arguments": {"a": 1}}})
    assert (job.prompt.messages, job.prompt.template) == ("prompt", None)
    assert job.prompt.chat_template_arguments == {"a": 1}
    with pytest.raises(ConfigError, match="reads talk"):
        resolve_column_config({"prompt": {"messages": "talk"}})


def test_a_function_can_neither_read_columns_nor_give_several_samples() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_column_config({"prompt": {"template": "{{ prompt }} {{ body }}"}, "sampling": {"n": 2}})
    assert fields(error) == ["prompt", "sampling.n"]


def test_the_engines_job_carries_no_columns_and_looks_for_no_id() -> None:
    job = engine_job(resolve_config(MINIMAL, id="key"))
    assert (job.input.columns, job.input.id) == ([], None)
