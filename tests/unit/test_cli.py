"""The command line: usage, exit codes, and what it loads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import dspark_batch
from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.cli import run_cli
from dspark_batch.errors import EngineError, FingerprintMismatchError, InputError
from dspark_batch.job.outcome import ExitCode, Outcome
from dspark_batch.testing.jobs import SCRIPTED, reviews, write_job

HEAVY = ("torch", "ray", "pyspark", "transformers")
Capture = pytest.CaptureFixture[str]


def loaded_after(code: str, *, environment: dict[str, str] | None = None) -> Sequence[str]:
    """The heavy modules in ``sys.modules`` of a clean process after running ``code``."""
    script = f"{code}\nimport sys\nprint('LOADED', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    return done.stdout.strip().splitlines()[-1].split()[1:]


def test_version_is_printed(capsys: Capture) -> None:
    assert run_cli(["version"]) == ExitCode.OK
    assert capsys.readouterr().out.strip() == dspark_batch.__version__


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dspark_batch", "version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (ExitCode.OK, dspark_batch.__version__), done.stderr


def test_help_names_commands_in_the_order_of_use_and_arguments_as_the_guide_does(capsys: Capture) -> None:
    assert run_cli(["--help"]) == ExitCode.OK
    words = capsys.readouterr().out.split()
    commands = [word for word in words if word in ("run", "estimate", "report", "train")]
    assert list(dict.fromkeys(commands)) == ["run", "estimate", "report", "train"]
    assert run_cli(["estimate", "--help"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "CONFIG" in out
    assert "[KEY=VALUE]..." in out
    assert "[[" not in out


def test_what_is_wrong_on_the_command_line_is_not_laid_on_the_config(tmp_path: Path, capsys: Capture) -> None:
    assert run_cli(["report", str(tmp_path)]) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err.startswith("dspark-batch: the command line is not valid:\n")
    assert (
        run_cli(["run", write_job(tmp_path, reviews(1)).write(), "prompt.template=Say {{ txt }}"])
        == ExitCode.BAD_CONFIG
    )
    assert capsys.readouterr().err.startswith("dspark-batch: the config is not valid:\n")


@pytest.mark.parametrize("arguments", [["run"], ["rn"], ["run", "a.yaml", "--preview", "0"], ["run", "x", "--no-such"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: Capture) -> None:
    assert run_cli(arguments) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err


def test_a_config_that_is_not_there_exits_with_2_without_a_traceback(capsys: Capture) -> None:
    assert run_cli(["run", "no/such.yaml"]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert "no/such.yaml: config: cannot be read" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad file"), ExitCode.FATAL),
        (EngineError("bad device"), ExitCode.FATAL),
        (FingerprintMismatchError("other settings"), ExitCode.BAD_CONFIG),
    ],
)
def test_errors_become_exit_codes_and_one_line(
    error: Exception, code: ExitCode, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> Outcome:
        raise error

    monkeypatch.setattr("dspark_batch.job.runner.run_job", fail)
    assert run_cli(["run", "a.yaml"]) == code
    assert capsys.readouterr().err == f"dspark-batch: {error}\n"


def test_the_outcome_of_a_run_is_printed_and_its_code_returned(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(code=ExitCode.SOME_ROWS_FAILED, text="some failed")
    monkeypatch.setattr("dspark_batch.job.runner.run_job", lambda *args, **options: outcome)
    assert run_cli(["run", "a.yaml"]) == ExitCode.SOME_ROWS_FAILED
    assert capsys.readouterr().out == "some failed\n"


def test_an_interrupted_run_says_that_it_can_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspark_batch.job.runner.run_job", interrupt)
    assert run_cli(["run", "a.yaml"]) == ExitCode.FATAL
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run", "--preview", "1"], ["run", "--dry-run"], ["estimate"]])
def test_what_writes_nothing_says_so_when_it_is_interrupted(
    command: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspark_batch.job.runner.dry_run_job", interrupt)
    monkeypatch.setattr("dspark_batch.job.preview.preview_job", interrupt)
    monkeypatch.setattr("dspark_batch.job.estimate.estimate_job", interrupt)
    assert run_cli([*command, "a.yaml"]) == ExitCode.FATAL
    assert capsys.readouterr().err == "dspark-batch: ended at once; nothing was written\n"


def test_a_load_that_was_left_does_not_disturb_the_end_of_the_process() -> None:
    """Python would end it in the midst of native code, which aborts the process."""
    code = (
        "import atexit, sys, threading, time\n"
        "from dspark_batch.cli import main\n"
        "atexit.register(print, 'unwound')\n"
        "threading.Thread(target=time.sleep, args=(60,), name='dspark-batch-load', daemon=True).start()\n"
        "sys.argv = ['dspark-batch', 'run', 'no/such.yaml']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (ExitCode.BAD_CONFIG, "")
    assert "cannot be read" in done.stderr


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_after("import dspark_batch, dspark_batch.cli, dspark_batch.job.runner, dspark_batch.ray_data") == []


def test_validating_a_config_loads_nothing_heavy(tmp_path: Path) -> None:
    job = write_job(tmp_path, reviews(3))
    code = f"from dspark_batch.job.loader import load_config\nload_config({job.write()!r})"
    assert loaded_after(code) == []


def test_a_dry_run_loads_nothing_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_FACTORY_VARIABLE, SCRIPTED)
    job = write_job(tmp_path, reviews(23))
    job.config["engine"]["backend"] = "ray"
    code = f"from dspark_batch.cli import run_cli\nassert run_cli(['run', {job.write()!r}, '--dry-run']) == 0"
    assert loaded_after(code) == []


def test_the_weights_of_a_model_are_identified_without_loading_anything_heavy(tmp_path: Path) -> None:
    job = write_job(tmp_path, reviews(5))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    job.config["model"] = {"target": str(tmp_path / "model")}
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "DSPARK_BATCH_CACHE": str(tmp_path / "cache")}
    code = f"from dspark_batch.cli import run_cli\nassert run_cli(['run', {job.write()!r}, '--dry-run']) == 0"
    assert loaded_after(code, environment=environment) == []
