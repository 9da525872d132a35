"""Whole runs of a real engine on a tiny checkpoint: what scripted engines cannot show."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.job.outcome import ExitCode
from dspark_batch.models.loader import resolve_dtype
from dspark_batch.models.sources import resolve_source, weights_fingerprint
from dspark_batch.report.records import read_run
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

CONTEXT = 64
TEXTS = ["abc", "d" * 40, "e" * 100]
"""A prompt that runs, one that needs more than ``LITTLE_MEMORY``, one over the context; a token is a byte."""
LITTLE_MEMORY = "engine.kv_cache_gib=0.00001"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE, raising=False)
    job = write_job(tmp_path, pa.table({"id": ["fits", "large", "never"], "text": TEXTS}))
    job.config |= {
        "model": {"target": str(save_tiny_checkpoint(tmp_path / "model"))},
        "speculation": {"drafter": "none", "schedule": "off"},
        "prompt": {"template": "{{ text }}", "chat": "never"},
        "sampling": {"max_new_tokens": 4, "ignore_eos": True},
        "engine": {"backend": "local", "device": "cpu", "max_context": CONTEXT, "kv_cache_gib": 0.001},
        "limits": {"max_failed_fraction": 1.0},
    }
    return job


def errors_of(job: Job) -> dict[str, Any]:
    rows = read_output(str(job.out)).to_pylist()
    return {row["id"]: row["error"] for row in rows if row["error"] is not None}


def test_more_memory_mends_a_row_that_had_too_little_and_nothing_mends_one_over_the_context(
    job: Job, capsys: Capture
) -> None:
    assert run_cli(["run", job.write(), LITTLE_MEMORY]) == ExitCode.SOME_ROWS_FAILED
    errors = errors_of(job)
    assert {row: (error["code"], error["retryable"]) for row, error in errors.items()} == {
        "large": ("prompt_too_long", True),
        "never": ("prompt_too_long", False),
    }
    assert "engine.kv_cache_gib" in errors["large"]["message"]
    assert "1 may succeed with --retry-failed" in capsys.readouterr().out
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.SOME_ROWS_FAILED
    assert errors_of(job) == {"never": errors["never"]}
    assert run_cli(["run", job.write(), "--retry-failed"]) == ExitCode.SOME_ROWS_FAILED
    assert "nothing to do" in capsys.readouterr().out


def logprobs_of(path: Path) -> list[Any]:
    return read_output(str(path)).column("logprobs").to_pylist()


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_run_keeps_the_dtype_of_its_first_engine_on_a_machine_that_would_take_another(
    job: Job, backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    here = resolve_dtype("auto", torch.device("cpu"))
    there = torch.float32 if here is torch.bfloat16 else torch.bfloat16
    name = str(there).removeprefix("torch.")
    job.config["sampling"]["logprobs"] = 1
    job.config["shards"]["rows"] = 1
    job.config["ray"] = {"shards_in_flight": 1}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(
            "dspark_batch.models.loader.resolve_dtype",
            lambda given, device: there if given == "auto" else resolve_dtype(given, device),
        )
        assert run_cli(["run", job.write(), "limits.max_generated_tokens=1"]) == ExitCode.FATAL
        assert json.loads((job.out / "_dspark" / "engine.json").read_text())["dtype"] == name
    if backend == "ray":
        request.getfixturevalue("ray_loopback")
    assert run_cli(["run", job.write(), f"engine.backend={backend}"]) == ExitCode.SOME_ROWS_FAILED
    for dtype, is_same in ((there, True), (here, False)):
        other = job.folder / str(dtype)
        run_cli(["run", job.write(), f"output.path={other}", f"model.dtype={str(dtype).removeprefix('torch.')}"])
        assert (logprobs_of(job.out) == logprobs_of(other)) is is_same


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_an_engine_with_other_weights_than_the_run_began_with_is_refused_by_name(
    job: Job, backend: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    own = weights_fingerprint(resolve_source(job.config["model"]["target"]))
    monkeypatch.setattr("dspark_batch.job.prepare._weights_identity", lambda *_: "moved-branch")
    if backend == "ray":
        request.getfixturevalue("ray_loopback")
    assert run_cli(["run", job.write(), f"engine.backend={backend}"]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert "model.target: " in err
    assert own[:16] in err
    assert "moved-branch" in err
    assert not job.parts()


def test_constrained_texts_are_what_they_have_to_be_and_cut_ones_are_told(job: Job, capsys: Capture) -> None:
    words = ["yes", "no", "yes, but"]
    job.config["sampling"] = {"max_new_tokens": 30, "temperature": 2.0, "choices": words}
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    rows = read_output(str(job.out)).to_pylist()
    assert {row["answer"] for row in rows if row["error"] is None} <= set(words)
    assert "cut by" not in capsys.readouterr().out

    job.config["output"]["path"] = str(job.folder / "schema")
    schema = {"type": "object", "properties": {"stars": {"enum": [1, 5]}}, "required": ["stars"]}
    job.config["sampling"] = {"max_new_tokens": 30, "json_schema": {**schema, "additionalProperties": False}}
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    rows = read_output(str(job.folder / "schema")).to_pylist()
    assert {row["answer"] for row in rows if row["error"] is None} <= {'{"stars":1}', '{"stars":5}'}

    typed = ["task=extract", f"output.path={job.folder / 'typed'}"]
    assert run_cli(["run", job.write(), *typed]) == ExitCode.SOME_ROWS_FAILED
    values = read_output(str(job.folder / "typed"))["answer"].to_pylist()
    assert values == [row["answer"] and json.loads(row["answer"]) for row in rows]

    job.config["output"]["path"] = str(job.folder / "cut")
    assert run_cli(["run", job.write(), "sampling.max_new_tokens=3"]) == ExitCode.SOME_ROWS_FAILED
    assert (
        "2 texts cut by sampling.max_new_tokens=3 before sampling.json_schema was fulfilled" in capsys.readouterr().out
    )


class PageText(HTMLParser):
    """What a page shows, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def test_the_report_of_a_run_has_its_totals_and_takes_names_as_text(job: Job, capsys: Capture) -> None:
    out = job.folder / "<script>alert('1')<"
    job.config["output"]["path"] = str(out)
    job.config["speculation"] = {"drafter": "ngram", "schedule": "fixed", "max_draft_tokens": 2}
    job.config["sampling"] = {"max_new_tokens": 12, "ignore_eos": True}
    assert run_cli(["run", job.write()]) == ExitCode.SOME_ROWS_FAILED
    assert f"report: {out}/_dspark/report.html" in capsys.readouterr().out
    page = PageText((out / "_dspark" / "report.html").read_text())
    assert str(out) in page.text
    assert "script" not in page.tags
    assert "rows 3 1 failed (33.3 %)" in page.text
    assert "generated tokens 24 43 prompt tokens" in page.text
    assert "prompt_too_long 1 33.33 %" in page.text
    assert "Throughput generated tokens per second" in page.text
    assert run_cli(["report", str(out)]) == ExitCode.OK
    assert "engine-hours" in capsys.readouterr().out
    (engine,) = read_run(str(out)).engines
    rows = [row for row in read_output(str(out)).to_pylist() if row["error"] is None]
    assert engine.total.num_generated_tokens == sum(row["num_generated_tokens"] for row in rows) == 24
    assert engine.total.num_rounds == sum(row["num_rounds"] for row in rows)
    assert engine.total.num_drafted_tokens == sum(row["num_drafted_tokens"] for row in rows)
    assert engine.total.num_accepted_tokens == sum(row["num_accepted_tokens"] for row in rows)
    assert sum(verified for verified, _ in engine.by_position) == engine.total.num_verified_tokens
    assert (engine.device, engine.total.num_prefill_tokens) == ("cpu", 43)
