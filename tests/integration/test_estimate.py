"""``dspark-batch estimate``: a pilot of a job, with a scripted engine and with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dspark_batch.batch.commit import read_output
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.job.estimate import default_rows
from dspark_batch.job.outcome import ExitCode
from dspark_batch.testing.counting_engine import FACTORY as COUNTING
from dspark_batch.testing.counting_engine import EngineFolder
from dspark_batch.testing.engine_factories import FAILURES_VARIABLE
from dspark_batch.testing.jobs import Job, reviews, write_job
from dspark_batch.testing.tiny import save_tiny_checkpoint

Capture = pytest.CaptureFixture[str]


def estimated(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert run_cli(["estimate", *arguments, "--json"]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_figures_of_a_job_are_shown_and_nothing_is_written(job: Job, capsys: Capture) -> None:
    arguments = ["--rows", "12", "--price-per-engine-hour", "3600", "engine.backend=ray", "ray.actors=2"]
    assert run_cli(["estimate", job.write(), *arguments]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert err == "loading smollm2-135m\ngenerating 12 rows drawn at random\n"
    assert "rows                      47\n" in out
    assert "pilot                     12 rows drawn at random\n" in out
    assert "prompt tokens per row     3.0\n" in out
    assert "on 2 engines, each on a machine like this one" in out
    assert "\nprice " in out
    assert "\nin brackets: 90 % intervals" in out
    assert not job.out.exists()


def test_where_choices_are_scored_the_speed_is_in_rows(job: Job, capsys: Capture) -> None:
    scored = ["task=classify", "sampling.choices=[a, b]", "sampling.temperature=0"]
    assert run_cli(["estimate", job.write(), "--rows", "12", *scored]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "\nrows/s " in out
    assert "generated tokens" not in out


def test_the_pilot_is_drawn_from_the_whole_table_and_always_the_same(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineFolder.make(job.folder / "engine")
    job.config["model"] = {"target": str(engine.path)}
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, COUNTING)
    estimated(capsys, job.write(), "--rows", "16")
    first = engine.rows()
    assert len(first) == len(set(first)) == 8 + 16, "eight more rows warm up"
    assert max(int(prompt.split()[-1]) for prompt in first) > 40
    engine.forget()
    estimated(capsys, job.write(), "--rows", "16")
    assert engine.rows() == first
    engine.forget()
    assert estimated(capsys, job.write())["num_pilot_rows"] == 42
    assert len(set(engine.rows())) == 47


def test_failed_rows_and_those_of_equal_prompts_are_told(
    make_job: Callable[[pa.Table], Job], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(pa.table({"id": [f"r{n}" for n in range(40)], "text": [f"t{n % 4}" for n in range(40)]}))
    monkeypatch.setenv(FAILURES_VARIABLE, "Say t1=engine_error")
    found = estimated(capsys, job.write(), "--rows", "32", "sampling.temperature=0")
    assert found["num_pilot_rows"] == 32
    assert found["failures"] == {"engine_error": round(32 * found["failed_fraction"]["value"])}
    assert found["failed_fraction"]["low"] < 0.25 < found["failed_fraction"]["high"]
    assert found["num_copied"] == 28
    notes = " ".join(found["notes"])
    assert "28 rows of the pilot took the text of an equal prompt" in notes
    assert "more rows failed than limits.max_failed_fraction=0.05 allows" in notes


def test_a_pilot_that_does_not_fill_the_batch_says_so(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineFolder.make(job.folder / "engine", max_concurrency=16)
    job.config["model"] = {"target": str(engine.path)}
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, COUNTING)
    found = estimated(capsys, job.write(), "--rows", "10")
    assert found["num_together"] == 10
    assert "decodes up to 16 samples together, the pilot 10" in " ".join(found["notes"])
    assert "--rows 32 fills the batch" in " ".join(found["notes"])
    assert len(estimated(capsys, job.write(), "--rows", "32")["notes"]) == 1


def test_a_table_smaller_than_the_batch_is_not_asked_for_more_rows_than_it_has(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineFolder.make(job.folder / "engine", max_concurrency=64)
    job.config["model"] = {"target": str(engine.path)}
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, COUNTING)
    notes = " ".join(estimated(capsys, job.write(), "--rows", "10")["notes"])
    assert "decodes up to 47 samples together, the pilot 10" in notes
    assert "--rows 47 fills the batch" in notes
    assert len(estimated(capsys, job.write())["notes"]) == 1


def test_a_pilot_of_all_rows_has_no_intervals_and_speaks_of_none(
    make_job: Callable[[pa.Table], Job], capsys: Capture
) -> None:
    assert run_cli(["estimate", make_job(reviews(3)).write()]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "brackets" not in out
    assert "(" not in out
    assert out.endswith("the pilot had all rows, so there are no intervals; what else a machine does is not known\n")


def test_the_price_of_a_small_job_is_not_zero(job: Job, capsys: Capture) -> None:
    assert run_cli(["estimate", job.write(), "--price-per-engine-hour", "0.01"]) == ExitCode.OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in ("engine-hours", "price"):
        assert float(next(line[1] for line in lines if line[0] == name)) > 0


@pytest.mark.parametrize("template", ["Say something", "Say {{ text }}"])
def test_rows_may_have_no_id_and_a_prompt_without_a_column(job: Job, capsys: Capture, template: str) -> None:
    job.config["input"].pop("id")
    job.config["prompt"]["template"] = template
    assert estimated(capsys, job.write(), "--rows", "20")["rows"] == {"value": 47.0, "low": 47.0, "high": 47.0}


def test_what_preview_refuses_is_refused(job: Job, capsys: Capture) -> None:
    assert run_cli(["estimate", job.write(), "prompt.template=Say {{ txt }}"]) == ExitCode.BAD_CONFIG
    assert "the input has no column 'txt'" in capsys.readouterr().err
    assert run_cli(["estimate", job.write(), "input.filter=stars > 99"]) == ExitCode.FATAL
    assert "none of 7 rows drawn at random passes input.filter='stars > 99'" in capsys.readouterr().err
    assert run_cli(["estimate", job.write(), "--rows", "1"]) == ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("concurrency", "samples", "rows"), [(64, 1, 128), (64, 4, 48), (8, 1, 48), (1024, 1, 512), (100, 3, 67)]
)
def test_a_pilot_has_by_default_what_fills_the_batch_within_bounds(concurrency: int, samples: int, rows: int) -> None:
    assert default_rows(concurrency, num_samples=samples) == rows


def test_the_estimate_of_a_tiny_model_is_what_the_job_comes_to(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE, raising=False)
    texts = ["a" * (1 + n % 9) + str(n) for n in range(240)]
    job = write_job(tmp_path, pa.table({"id": list(range(240)), "text": texts, "third": [n % 3 for n in range(240)]}))
    job.config |= {
        "model": {"target": str(save_tiny_checkpoint(tmp_path / "model"))},
        "speculation": {"drafter": "none", "schedule": "off"},
        "prompt": {"template": "{{ text }}", "chat": "never"},
        "sampling": {"max_new_tokens": 12, "temperature": 1.5},
        "engine": {"backend": "local", "device": "cpu", "max_context": 64, "kv_cache_gib": 0.002, "max_concurrency": 8},
        "shards": {"rows": 32},
    }
    job.config["input"]["filter"] = "third > 0"
    found = estimated(capsys, job.write(), "--rows", "64")
    assert not job.out.exists()
    assert run_cli(["run", job.write()]) == ExitCode.OK
    rows = read_output(str(job.out)).to_pylist()
    for column in ("num_prompt_tokens", "num_generated_tokens"):
        interval = found[column.removeprefix("num_")]
        assert interval["low"] <= sum(row[column] for row in rows) <= interval["high"]
    assert found["rows"]["low"] <= len(rows) <= found["rows"]["high"]
    assert (found["num_together"], found["had_queue"]) == (8, True)
    assert found["tokens_per_s"] > 0
    assert 0 < found["time_s"]["low"] < found["time_s"]["value"] < found["time_s"]["high"]
