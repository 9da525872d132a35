"""Prompts from the target's own words, from tables and from a finished job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.core import FinishReason, Message, Request, Result
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.models.text import TextCodec
from dspark_batch.testing.jobs import SCRIPTED, write_job
from dspark_batch.testing.tiny import save_tiny_checkpoint
from dspark_batch.training.config import SampledSource, TableSource
from dspark_batch.training.deadline import Deadline, TimeUpError
from dspark_batch.training.generation import Generator
from dspark_batch.training.prompts import (
    distinct_texts,
    job_rows,
    sample_prompts,
    sampling_requests,
    table_prompts,
    user_turn,
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    found = TextCodec.from_folder(save_tiny_checkpoint(tmp_path_factory.mktemp("m")))
    assert found is not None
    return found


def scripted(codec: TextCodec, texts: list[str], *, calls: list[str] | None = None) -> Generator:
    """Answers request number i with texts[i], and the token that ends a turn."""
    end = user_turn(codec).end

    def generate(requests: Iterable[Request]) -> Iterator[Result]:
        for request in reversed(list(requests)):
            number = int(request.id.split(":")[1])
            text = texts[number % len(texts)]
            if calls is not None:
                calls.append(request.id)
            is_long = text.endswith("...")
            yield Result(
                id=request.id,
                token_ids=tuple(codec.encode_plain(text) + ([] if is_long else [end])),
                finish_reason=FinishReason.LENGTH if is_long else FinishReason.STOP,
            )

    return Generator(generate, codec, (257,))


def test_the_user_turn_is_what_the_template_puts_around_the_words(codec: TextCodec) -> None:
    turn = user_turn(codec)
    text = "what now"
    whole = codec.encode_chat([Message("user", text)])
    start = len(turn.before)
    assert whole[:start] == list(turn.before)
    assert whole[start : start + len(codec.encode_plain(text)) + 1] == [*codec.encode_plain(text), turn.end]
    assert codec.decode([turn.end], skip_special_tokens=False) == "<|end|>"


def test_requests_begin_with_the_openings_in_turn(codec: TextCodec) -> None:
    section = SampledSource(num_samples=5, openings=["", "How many "])
    turn = user_turn(codec)
    requests = list(sampling_requests(section, turn, codec, numbers=range(3)))
    assert [r.id for r in requests] == ["0:0", "1:1", "0:2"]
    assert requests[0].prompt_token_ids == turn.before
    assert requests[1].prompt_token_ids == (*turn.before, *codec.encode_plain("How many "))
    assert requests[0].sampling.stop_token_ids == (turn.end,)


def test_scraps_unfinished_turns_and_repeats_are_dropped(codec: TextCodec, tmp_path: Path) -> None:
    texts = ["Tell me of whales.", "no", "this never ends ...", "tell me  of whales", "What is a boat?"]
    section = SampledSource(num_samples=10, min_characters=8)
    rows = sample_prompts(section, scripted(codec, texts), folder=tmp_path, deadline=Deadline())
    expected = [codec.encode_chat([Message("user", text)]) for text in (texts[0], texts[4])]
    assert [row.token_ids.tolist() for row in rows] == expected
    assert all(row.prompt_len == len(row.token_ids) for row in rows)


def test_an_ending_is_put_after_turns_of_its_opening(codec: TextCodec, tmp_path: Path) -> None:
    section = SampledSource(num_samples=2, openings=["How many ", ""], endings={"How many ": " Think first."})
    rows = sample_prompts(section, scripted(codec, ["boats?", "What is a boat?"]), folder=tmp_path, deadline=Deadline())
    texts = ["How many boats? Think first.", "What is a boat?"]
    assert [r.token_ids.tolist() for r in rows] == [codec.encode_chat([Message("user", text)]) for text in texts]


def test_distinct_texts_keep_the_first_spelling() -> None:
    assert distinct_texts(["A b!", "a  B", "c"]) == ["A b!", "c"]


def test_sampling_stops_between_parts_and_goes_on_with_those_that_are_missing(codec: TextCodec, tmp_path: Path) -> None:
    section = SampledSource(num_samples=9, samples_per_part=4)
    texts = [f"prompt number {i} of all" for i in range(9)]
    calls: list[str] = []
    ticks = iter(range(100))
    deadline = Deadline(end_s=1.5, clock=lambda: float(next(ticks)))
    with pytest.raises(TimeUpError):
        sample_prompts(section, scripted(codec, texts, calls=calls), folder=tmp_path, deadline=deadline)
    assert len(calls) == 8
    rows = sample_prompts(section, scripted(codec, texts, calls=calls), folder=tmp_path, deadline=Deadline())
    assert sorted(calls) == sorted(f"0:{i}" for i in range(9))
    assert len(rows) == 9


def test_a_target_without_a_chat_template_cannot_invent_prompts(tmp_path: Path) -> None:
    generator = Generator(lambda requests: iter(()), None, ())
    with pytest.raises(ConfigError, match=r"prompts\.table"):
        sample_prompts(SampledSource(), generator, folder=tmp_path, deadline=Deadline())


def test_tables_are_read_as_a_job_reads_them(codec: TextCodec, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"question {i}"]}) + "\n" for i in range(5)))
    source = TableSource.model_validate(
        {"input": {"path": str(file)}, "prompt": {"template": "{{ turns[0] }}?"}, "max_rows": 3}
    )
    rows = table_prompts(source, codec, name="set")
    assert len(rows) == 3
    assert rows[1].token_ids.tolist() == codec.encode_chat([Message("user", "question 1?")])


def test_conversations_are_prompts_with_the_arguments_of_their_chat_template(tmp_path: Path) -> None:
    codec = TextCodec.from_folder(save_tiny_checkpoint(tmp_path / "m"))
    assert codec is not None
    codec._tokenizer.chat_template = "{{ mode }}{% for message in messages %}{{ message.content }}{% endfor %}"
    file = tmp_path / "p.jsonl"
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    file.write_text(json.dumps({"talk": talk}) + "\n" + json.dumps({"talk": []}) + "\n")
    prompt = {"messages": "talk", "chat_template_arguments": {"mode": "x"}}
    source = TableSource.model_validate({"input": {"path": str(file)}, "prompt": prompt})
    assert [codec.decode(row.token_ids.tolist()) for row in table_prompts(source, codec, name="set")] == ["xab"]


def test_text_prompts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "a"}\n')
    source = TableSource.model_validate({"input": {"path": str(file)}, "prompt": {"template": "{{ text }}"}})
    with pytest.raises(ConfigError, match="no tokenizer"):
        table_prompts(source, None, name="set")


@pytest.mark.parametrize("prefix", ["", "said_"])
@pytest.mark.parametrize("keeps_ids", [True, False])
def test_a_finished_job_gives_its_prompts_with_its_own_responses(
    codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_ids: bool, prefix: str
) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    job = write_job(tmp_path, pa.table({"id": ["a", "b", "c"], "text": ["x", None, "z"]}))
    job.config["output"] |= {"token_ids": keeps_ids, "prefix": prefix}
    job.config["limits"] = {"max_failed_fraction": 1.0}
    run_cli(["run", job.write()])
    rows = job_rows(str(job.path), codec, eos_token_ids=(257,))
    prompts = [row.token_ids[: row.prompt_len].tolist() for row in rows]
    assert prompts == [codec.encode_chat([Message("user", f"Say {text}")]) for text in ("x", "z")]
    assert all(row.num_response_tokens > 0 for row in rows)
    assert {row.temperature for row in rows} == {0.7}


@pytest.mark.parametrize("keeps_ids", [True, False])
def test_the_responses_of_typed_columns_are_their_token_ids(
    codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_ids: bool
) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, "dspark_batch.testing.engine_factories:echoing")
    job = write_job(tmp_path, pa.table({"id": ["a"], "text": ['{"n":7}']}))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    job.config |= {"task": "extract", "prompt": {"template": "{{ text }}"}, "sampling": {"json_schema": schema}}
    job.config["output"]["token_ids"] = keeps_ids
    run_cli(["run", job.write()])
    if keeps_ids:
        (row,) = job_rows(str(job.path), codec, eos_token_ids=())
        assert row.token_ids[row.prompt_len :].tolist() == list(map(ord, '{"n":7}'))
        return
    with pytest.raises(InputError, match=r"output\.token_ids: true"):
        job_rows(str(job.path), codec, eos_token_ids=())


def test_a_job_without_output_is_an_error_that_names_the_path(codec: TextCodec, tmp_path: Path) -> None:
    job = write_job(tmp_path, pa.table({"id": ["a"], "text": ["x"]}))
    job.write()
    with pytest.raises(Exception, match="out") as caught:
        job_rows(str(job.path), codec, eos_token_ids=())
    assert not isinstance(caught.value, InputError | AssertionError)
