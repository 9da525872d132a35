"""The config loader: YAML, overrides, and every problem with its field, value and source."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dspark_batch.core import Constraint
from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import JobConfig, PromptSection
from dspark_batch.job.loader import COMMAND_LINE, absolute_paths, dump_config, load_config

MINIMAL = """
input: {path: in.parquet}
prompt: {template: "{{ text }}"}
output: {path: out}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides=overrides)
    return {problem.field: problem for problem in caught.value.problems}


def test_a_minimal_file_takes_every_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.model.target == "smollm2-135m"
    assert config.sampling.to_params().max_new_tokens == 256


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL + "ray:\n")).ray.actors.max == 1


def test_actors_are_a_number_or_a_range(tmp_path: Path) -> None:
    fixed = load_config(write(tmp_path, MINIMAL), overrides=["ray.actors=3"]).ray.actors
    assert (fixed.min, fixed.max, fixed.is_fixed) == (3, 3, True)
    config = load_config(write(tmp_path, MINIMAL), overrides=["ray.actors={min: 1, max: 4}"])
    assert (config.ray.actors.min, config.ray.actors.max, config.ray.actors.is_fixed) == (1, 4, False)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert yaml.safe_load(dump_config(config))["ray"]["actors"] == {"min": 1, "max": 4}


@pytest.mark.parametrize(
    ("value", "field", "message"),
    [
        ("0", "ray.actors.min", "greater than or equal to 1, got 0"),
        ("{min: 3, max: 2}", "ray.actors.min", "at most ray.actors.max, got 3 and 2"),
        ("{min: 1}", "ray.actors.max", "required"),
        ("many", "ray.actors", "'many'"),
    ],
)
def test_other_numbers_of_actors_are_refused(tmp_path: Path, value: str, field: str, message: str) -> None:
    assert message in problems_of(write(tmp_path, MINIMAL), f"ray.actors={value}")[field].message


def test_overrides_are_yaml_and_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "sampling: {seed: 1, top_k: 5, temperature: 0.5}\n")
    config = load_config(path, overrides=["sampling.seed=7", "sampling.top_k=null", "sampling.stop=[a, b]"])
    assert (config.sampling.seed, config.sampling.top_k, config.sampling.stop) == (7, None, ["a", "b"])
    assert config.sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("choices=[]", "at least one text"),
        ("choices=[a, '']", "no empty one"),
        ("choices=[a, b, a]", "must differ"),
        ("regex=''", "must not be empty"),
        ("regex='(a'", "unclosed group"),
        ("grammar='start: word'", "unknown name"),
        ("json_schema={type: nonsense}", "Invalid type: nonsense"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_refused(tmp_path: Path, value: str, said: str) -> None:
    ((field, problem),) = problems_of(write(tmp_path, MINIMAL), f"sampling.{value}").items()
    assert field == f"sampling.{value.partition('=')[0]}"
    assert said in problem.message
    assert problem.source == COMMAND_LINE


def test_one_constraint_at_most_and_none_that_never_ends(tmp_path: Path) -> None:
    two = problems_of(write(tmp_path, MINIMAL), "sampling.regex=a", "sampling.choices=[a]")
    assert "at most one of sampling.choices, sampling.regex" in two["sampling"].message
    endless = problems_of(write(tmp_path, MINIMAL), "sampling.regex=a", "sampling.ignore_eos=true")
    assert any("must be false where the text is constrained" in problem.message for problem in endless.values())


def test_extract_needs_a_schema(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, MINIMAL + "task: extract\n"), "sampling.choices=[a, b]").values()
    assert (problem.field, problem.source) == ("sampling.json_schema", str(tmp_path / "job.yaml"))
    assert "must say what task extract takes out" in problem.message
    typed = load_config(write(tmp_path, MINIMAL + "task: extract\nsampling: {json_schema: {type: integer}}\n"))
    assert load_config(write(tmp_path, dump_config(typed))) == typed


def test_a_section_without_a_constraint_reads_as_before_there_were_any(tmp_path: Path) -> None:
    free = load_config(write(tmp_path, MINIMAL)).sampling
    assert "choices" not in free.model_dump()
    bound = load_config(write(tmp_path, MINIMAL), overrides=["sampling.choices=[a, b]"]).sampling
    assert bound.model_dump(mode="json")["choices"] == ["a", "b"]
    assert bound.to_params().constraint == Constraint("choices", '["a", "b"]')


@pytest.mark.parametrize("field", ["sampling", "input.catalog", "prompt.chat_template_arguments"])
def test_what_is_no_mapping_is_refused_in_words_of_yaml(tmp_path: Path, field: str) -> None:
    problem = problems_of(write(tmp_path, MINIMAL), f"{field}=[a]")[field]
    assert problem.message == "must be a mapping, such as {key: value}, got ['a']"


def test_an_override_may_hold_an_equals_sign(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), overrides=["input.filter=stars == 5"])
    assert config.input.filter == "stars == 5"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prompt.template={{ txt }}", """put text in quotes: 'prompt.template="{{ txt }}"'"""),
        ("prompt.template=Say: {{ txt }}", """put text in quotes: 'prompt.template="Say: {{ txt }}"'"""),
        ("sampling.regex=[0-9]{3}-[a-z]+", """put text in quotes: 'sampling.regex="[0-9]{3}-[a-z]+"'"""),
        ("sampling.regex=[0-9]", """put text in quotes: 'sampling.regex="[0-9]"'"""),
        ("sampling.choices=[yes,no]", """put text in quotes: 'sampling.choices=["yes", "no"]'"""),
        ("input.id=7", """put text in quotes: 'input.id="7"'"""),
    ],
)
def test_text_that_yaml_reads_otherwise_is_refused_with_how_to_quote_it(
    tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), overrides=[override])
    assert said in str(caught.value)
    assert all(line.startswith("command line: ") for line in str(caught.value).splitlines())
    (fixed,) = shlex.split(said.removeprefix("put text in quotes: "))
    key, _, text = fixed.partition("=")
    value = yaml.safe_load(text)
    assert all(isinstance(part, str) for part in (value if key == "sampling.choices" else [value]))


def test_text_below_an_override_of_a_section_gets_no_hint(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, MINIMAL), "sampling={regex: 7}")
    assert problems["sampling.regex"].message == "input should be a valid string, got 7"


def test_overrides_as_one_text_and_a_config_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"overrides: must be a list of texts, such as \['a=b'\], got 'a=b'"):
        load_config(write(tmp_path, MINIMAL), overrides="a=b")
    with pytest.raises(
        ConfigError, match="config: must be a YAML file, a mapping of sections or a JobConfig, got None"
    ):
        load_config(None)  # type: ignore[arg-type]


def test_all_problems_are_listed_with_field_value_and_source(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "sampling: {top_p: 2, temperature: -1}\nengine: {threads: many}\n")
    problems = problems_of(path, "shards.rows=0", "nonsense")
    assert problems["sampling.top_p"].message == "must lie in (0, 1], got 2.0"
    assert "got -1.0" in problems["sampling.temperature"].message
    assert "'many'" in problems["engine.threads"].message
    assert problems["engine.threads"].source == str(path)
    assert problems["shards.rows"].source == COMMAND_LINE
    assert "got 0" in problems["shards.rows"].message
    assert "key=value" in problems["nonsense"].message


@pytest.mark.parametrize(
    ("text", "field", "suggestion"),
    [("samplng: {}\n", "samplng", "sampling"), ("sampling: {temprature: 1}\n", "sampling.temprature", "temperature")],
)
def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path, text: str, field: str, suggestion: str) -> None:
    message = problems_of(write(tmp_path, MINIMAL + text))[field].message
    assert f"did you mean '{suggestion}'?" in message


def test_an_unknown_key_unlike_any_other_lists_the_known_ones(tmp_path: Path) -> None:
    assert "actors" in problems_of(write(tmp_path, MINIMAL + "ray: {zzz: 1}\n"))["ray.zzz"].message


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, MINIMAL + "sampling:\n  seed: 1\n  seed: 2\n"))
    assert "line 7" in problems["seed"].message


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, "input: {path: a}\n"))
    assert problems["prompt"].message == problems["output"].message == "is required and missing"


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1\n"], ids=["list", "empty", "not yaml"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "config" in problems_of(write(tmp_path, text))


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(tmp_path / "absent.yaml")["config"].message


def test_template_and_token_ids_together_are_refused(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, MINIMAL), "prompt.token_ids=ids")
    assert "exactly one" in problems["prompt"].message


def test_relative_paths_become_absolute_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = load_config(write(tmp_path, MINIMAL), overrides=["input.path=[a/*.parquet, s3://b/c]"])
    resolved = absolute_paths(config, base=tmp_path)
    assert resolved.input.path == [f"{tmp_path}/a/*.parquet", "s3://b/c"]
    assert resolved.output.path == f"{tmp_path}/out"
    assert resolved.model.target == "smollm2-135m"
    local = config.model_copy(update={"model": config.model.model_copy(update={"target": "model"})})
    assert absolute_paths(local, base=tmp_path).model.target == f"{tmp_path}/model"


def test_a_dumped_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    dumped = dump_config(config)
    assert load_config(write(tmp_path, dumped)) == config
    assert set(yaml.safe_load(dumped)) == set(JobConfig.model_fields)


@pytest.mark.parametrize(
    ("overrides", "num_shards", "in_flight"),
    [
        ([], 100, 2),
        (["shards.rows=16"], 100, 16),
        (["shards.rows=16"], 6, 6),
        (["shards.rows=16", "ray.actors=4"], 6, 2),
        (["shards.rows=16", "ray.shards_in_flight=3"], 100, 3),
        ([], 1, 1),
    ],
)
def test_small_shards_are_decoded_together_but_shared_out_evenly(
    tmp_path: Path, overrides: list[str], num_shards: int, in_flight: int
) -> None:
    config = load_config(write(tmp_path, MINIMAL), overrides=overrides)
    assert config.shards_in_flight(num_shards=num_shards) == in_flight


@pytest.mark.parametrize(
    ("prompt", "field", "message"),
    [
        ("{messages: m, template: x}", "prompt", "exactly one"),
        ("{messages: m, token_ids: ids}", "prompt", "exactly one"),
        ("{system: x}", "prompt", "exactly one"),
        ("{token_ids: ids, system: x}", "prompt.system", "needs a template or messages"),
        ("{messages: m, chat: never}", "prompt.messages", "needs the chat template"),
        ("{template: x, chat: never, chat_template_arguments: {a: 1}}", "prompt.chat_template_arguments", "leave them"),
        ("{token_ids: ids, chat_template_arguments: {a: 1}}", "prompt.chat_template_arguments", "leave them"),
        ("{template: x, chat_template_arguments: {a: 2026-01-01}}", "prompt.chat_template_arguments", "JSON"),
        ("{template: x, chat_template_arguments: {a: [.nan]}}", "prompt.chat_template_arguments", "JSON"),
        ("{template: x, chat_template_arguments: [a]}", "prompt.chat_template_arguments", "must be a mapping"),
        (
            "{template: x, chat_template_arguments: {messages: []}}",
            "prompt.chat_template_arguments",
            "not hold messages",
        ),
    ],
)
def test_prompts_that_do_not_fit_together_are_refused(tmp_path: Path, prompt: str, field: str, message: str) -> None:
    text = f"input: {{path: a}}\nprompt: {prompt}\noutput: {{path: b}}\n"
    assert message in problems_of(write(tmp_path, text))[field].message


def test_arguments_of_the_chat_template_are_any_json_and_can_be_laid_over(tmp_path: Path) -> None:
    overrides = [
        "prompt.chat_template_arguments.enable_thinking=false",
        "prompt.chat_template_arguments.tools=[{a: b}]",
    ]
    config = load_config(write(tmp_path, MINIMAL), overrides=overrides)
    assert config.prompt.chat_template_arguments == {"enable_thinking": False, "tools": [{"a": "b"}]}
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_what_the_engine_decides_when_it_renders_a_chat_is_no_argument() -> None:
    from transformers import PreTrainedTokenizerBase

    parameters = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    for name in {*parameters, "messages"} - {"tools", "documents", "kwargs"}:
        with pytest.raises(ValidationError, match=f"must not hold {name}"):
            PromptSection(template="x", chat_template_arguments={name: None})


def test_a_classifying_job_needs_choices_and_nothing_that_draws(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    assert "must name the labels" in problems_of(file, "task=classify")["sampling.choices"].message
    found = problems_of(file, "task=classify", "sampling.choices=[a, b]", "sampling.temperature=0.5", "sampling.n=2")
    assert found.keys() == {"sampling.temperature", "sampling.n"}
    assert "must be 0 where choices are scored" in found["sampling.temperature"].message
    job = load_config(file, overrides=["task=classify", "sampling.choices=[a, b]", "speculation.drafter=suffix"])
    assert job.sampling_params().score_choices
    assert job.engine_config().drafter == "none"
