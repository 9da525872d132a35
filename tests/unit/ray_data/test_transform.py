"""``Generate`` as a plain callable; no Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dspark_batch.errors import ConfigError
from dspark_batch.job.loader import config_from_values
from dspark_batch.ray_data import Generate
from dspark_batch.testing.jobs import SCRIPTED, reviews

CONFIG: dict[str, Any] = {
    "input": {"id": "id"},
    "prompt": {"template": "Say {{ text }}"},
    "output": {"column": "answer"},
    "sampling": {"temperature": 0.5},
}


def test_rows_are_the_same_however_the_table_is_cut() -> None:
    table = reviews(29)
    whole = Generate(CONFIG, engine_factory=SCRIPTED)(table)
    cut = Generate(CONFIG, engine_factory=SCRIPTED)
    parts = [cut(table.slice(start, 7)) for start in range(0, 29, 7)]
    assert pa.concat_tables(parts).equals(whole)
    assert whole.column_names[:4] == ["id", "text", "stars", "answer"]
    assert whole.column("error").null_count == 29


def test_a_table_of_several_chunks_and_an_empty_one_are_fine() -> None:
    generate = Generate(CONFIG, engine_factory=SCRIPTED)
    table = pa.concat_tables([reviews(5), reviews(3)])
    assert generate(table).num_rows == 8
    assert generate(table.slice(0, 0)).schema == generate(table).schema


def test_a_row_that_cannot_be_generated_keeps_its_place() -> None:
    table = reviews(3).set_column(1, "text", pa.array(["a", None, "c"]))
    out = Generate(CONFIG, engine_factory=SCRIPTED)(table)
    assert [row["error"] and row["error"]["code"] for row in out.to_pylist()] == [None, "null_prompt", None]


def test_extracted_values_have_the_type_of_the_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    config = {**CONFIG, "task": "extract", "prompt": {"template": "{{ text }}"}, "sampling": {"json_schema": schema}}
    table = reviews(2).set_column(1, "text", pa.array(['{"n":7}', '{"n":']))
    out = Generate(config, engine_factory="dspark_batch.testing.engine_factories:echoing")(table)
    assert out.schema.field("answer").type == pa.struct([("n", pa.int64())])
    assert out["answer"].to_pylist() == [{"n": 7}, None]


def test_sampling_without_an_id_column_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"input\.id"):
        Generate({**CONFIG, "input": {}}, engine_factory=SCRIPTED)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ConfigError, match="no column 'text'"):
        Generate(CONFIG, engine_factory=SCRIPTED)(reviews(3).drop_columns(["text"]))


def test_an_invalid_config_is_refused_with_every_problem() -> None:
    with pytest.raises(ConfigError) as error:
        Generate({**CONFIG, "sampling": {"top_p": 7}, "modle": {}}, engine_factory=SCRIPTED)
    assert {problem.field for problem in error.value.problems} == {"sampling.top_p", "modle"}


@pytest.mark.parametrize("of", [lambda config: config, lambda config: config_from_values(config, source="test")])
def test_what_only_files_have_is_refused_rather_than_ignored(of: Callable[[dict[str, Any]], Any]) -> None:
    source = {"path": "p", "id": "id", "filter": "stars > 3", "incremental": "rows"}
    with pytest.raises(ConfigError) as error:
        Generate(of({**CONFIG, "input": source, "output": {"path": "o"}}), engine_factory=SCRIPTED)
    assert [problem.field for problem in error.value.problems] == ["input.filter", "input.incremental"]
    assert "filter the rows before" in str(error.value)
    with pytest.raises(ConfigError, match=r"input\.limit: .* give so many rows"):
        Generate(of({**CONFIG, "input": {"path": "p", "limit": 3}, "output": {"path": "o"}}), engine_factory=SCRIPTED)


def test_a_config_file_will_do(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("prompt: {template: 'Say {{ text }}'}\n")
    assert Generate(file, engine_factory=SCRIPTED)(reviews(3)).column("generated").null_count == 0
