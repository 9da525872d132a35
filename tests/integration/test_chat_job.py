"""Whole runs over conversations, by a real engine on a tiny checkpoint whose chat template shows an argument."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.feather as feather
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.core import Message
from dspark_batch.job.outcome import ExitCode
from dspark_batch.models.text import TextCodec
from dspark_batch.ray_data import Generate
from dspark_batch.testing.jobs import Job, write_job
from dspark_batch.testing.tiny import save_tiny_checkpoint

Capture = pytest.CaptureFixture[str]
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

BACKENDS = ["local", pytest.param("ray", marks=(pytest.mark.ray, pytest.mark.slow))]
CONTEXT = 160
GOOD: dict[str, list[tuple[str, str]]] = {
    "one": [("user", "Hi?")],
    "turns": [("user", "Hi?"), ("assistant", "Ho."), ("user", "Why?")],
    "own": [("system", "Rhyme."), ("user", "Hi?")],
}
BAD: dict[str, tuple[list[tuple[str | None, str | None] | None] | None, str]] = {
    "null": (None, "null_prompt"),
    "empty": ([], "empty_prompt"),
    "no_message": ([None], "invalid_messages"),
    "no_role": ([(None, "Hi?")], "invalid_messages"),
    "no_content": ([("user", None)], "invalid_messages"),
    "human": ([("human", "Hi?")], "invalid_messages"),
    "answered": ([("user", "Hi?"), ("assistant", "Ho.")], "invalid_messages"),
    "long": ([("user", "x" * CONTEXT)], "prompt_too_long"),
}


def conversations() -> pa.Table:
    talks: dict[str, Any] = {**GOOD, **{name: talk for name, (talk, _) in BAD.items()}}
    values = [
        talk and [turn and {"name": "ann", "role": turn[0], "content": turn[1]} for turn in talk]
        for talk in talks.values()
    ]
    kind = pa.struct([("name", pa.string()), ("role", pa.string()), ("content", pa.string())])
    return pa.table({"id": list(talks), "talk": pa.array(values, pa.list_(kind))})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE, raising=False)
    model = save_tiny_checkpoint(tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{% if mode is defined %}[mode {{ mode }}]\n{% endif %}" + template.read_text())
    job = write_job(tmp_path, conversations(), rows_per_shard=3)
    job.config |= {
        "model": {"target": str(model), "dtype": "float32"},
        "speculation": {"drafter": "none", "schedule": "off"},
        "prompt": {"messages": "talk", "system": "Be brief."},
        "sampling": {"max_new_tokens": 4, "ignore_eos": True},
        "engine": {"backend": "local", "device": "cpu", "max_context": CONTEXT, "kv_cache_gib": 0.002},
        "limits": {"max_failed_fraction": 1.0},
    }
    return job


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_output(str(out)).to_pylist()}


def num_tokens(job: Job, messages: list[tuple[str, str]], **arguments: object) -> int:
    codec = TextCodec.from_folder(Path(job.config["model"]["target"]))
    assert codec is not None
    return len(codec.encode_chat([Message(*turn) for turn in messages], arguments=arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_conversations_are_answered_and_bad_ones_fail_alone(
    job: Job, backend: str, request: pytest.FixtureRequest
) -> None:
    if backend == "ray":
        request.getfixturevalue("ray_loopback")
    job.config["engine"]["backend"] = backend
    job.config["prompt"]["chat_template_arguments"] = {"mode": False}
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    rows = rows_of(job.out)
    assert {name: rows[name]["error"]["code"] for name in BAD} == {name: code for name, (_, code) in BAD.items()}
    brief = ("system", "Be brief.")
    for name, talk in GOOD.items():
        assert rows[name]["error"] is None
        assert rows[name]["answer"] is not None
        messages = talk if name == "own" else [brief, *talk]
        assert rows[name]["num_prompt_tokens"] == num_tokens(job, messages, mode=False)
    assert read_output(str(job.out)).select(["id", "talk"]).equals(conversations())


def test_arguments_of_the_chat_template_decide_the_prompt_and_are_part_of_the_run(job: Job, capsys: Capture) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    override = "prompt.chat_template_arguments.mode=quick"
    capsys.readouterr()
    assert run_cli(["run", job.write(), override]) == ExitCode.BAD_CONFIG
    assert "prompt.chat_template_arguments: None there, {'mode': 'quick'} here" in capsys.readouterr().err
    assert run_cli(["run", job.write(), override, "--preview", "1"]) == ExitCode.OK
    shown = (
        "  [mode quick]\n  <|start|>system\n  Be brief.<|end|>\n  <|start|>user\n  Hi?<|end|>\n  <|start|>assistant\n"
    )
    assert shown in capsys.readouterr().out
    plain = ["prompt={template: Hi, chat_template_arguments: {mode: 1}}", f"output.path={job.folder / 'plain'}"]
    assert run_cli(["run", job.write(), *plain]) == ExitCode.OK
    expected = num_tokens(job, [("user", "Hi")], mode=1)
    assert {row["num_prompt_tokens"] for row in rows_of(job.folder / "plain").values()} == {expected}


def test_a_model_without_a_chat_template_is_refused(job: Job, capsys: Capture) -> None:
    (Path(job.config["model"]["target"]) / "chat_template.jinja").unlink()
    assert run_cli(["run", job.write()]) == ExitCode.BAD_CONFIG
    assert "prompt.messages: needs a chat template, and the model has none" in capsys.readouterr().err
    assert not job.parts()


@pytest.mark.parametrize("suffix", ["jsonl", "arrow", "csv"])
def test_every_format_that_holds_conversations_gives_the_same_answers(job: Job, suffix: str) -> None:
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    table, file = conversations(), job.folder / f"in.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif suffix == "arrow":
        feather.write_feather(table, str(file), compression="uncompressed")
    else:
        texts = [json.dumps(value) for value in table.column("talk").to_pylist()]
        pc.write_csv(table.set_column(1, "talk", pa.array(texts)), file)
    out = job.folder / suffix
    assert run_cli(["run", job.write(), f"input.path={file}", f"output.path={out}"]) == ExitCode.SOME_ROWS_FAILED
    found, expected = rows_of(out), rows_of(job.out)
    assert {name: row["answer"] for name, row in found.items()} == {
        name: row["answer"] for name, row in expected.items()
    }


def test_generate_gives_the_answers_of_the_job(job: Job) -> None:
    job.config["prompt"]["chat_template_arguments"] = {"mode": True}
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    sections = {name: job.config[name] for name in ("model", "speculation", "prompt", "sampling", "engine")}
    generate = Generate({**sections, "input": {"id": "id"}, "output": {"column": "answer"}})
    found = generate(conversations())
    assert found.sort_by("id").equals(read_output(str(job.out)).sort_by("id"))
