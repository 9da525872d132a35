"""Every benchmark is a command that explains itself; options have one name everywhere."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from dspark_batch import bench
from dspark_batch.bench import kernels, memory, shared_prefix
from dspark_batch.bench.options import BAD_CONFIG, engine_config, names, run_module
from dspark_batch.errors import ModelError
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.testing.tiny import save_tiny_checkpoint

FOLDER = Path(bench.__file__).parent
COMMANDS = sorted(
    ".".join(("dspark_batch", "bench", *path.relative_to(FOLDER).with_suffix("").parts))
    for path in FOLDER.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and not path.stem.endswith("_peer")
)
"""A peer's process is told what to do on its standard input."""


def json_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_there_are_commands() -> None:
    assert {"dspark_batch.bench.memory", "dspark_batch.bench.peers.run"} < set(COMMANDS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", COMMANDS)
def test_every_benchmark_lists_its_options(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert not end.value.code
    assert "--help" in capsys.readouterr().out


def test_the_memory_command_prints_samples_and_on_request_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module(memory.command, ["--rows", "60", "--drafter", "none", "--json"]) == 0
    assert json_line(capsys)["num_requests"] == 60


def test_the_shared_prefix_command_runs_on_any_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_tiny_checkpoint(tmp_path / "tiny")
    arguments = ["--rows", "5", "--prefix-tokens", "40", "--own-tokens", "3", "--max-new-tokens", "4"]
    assert run_module(shared_prefix.command, [*arguments, "--target", str(target), "--json"]) == 0
    found = json_line(capsys)
    assert found["outputs_equal"]
    assert (found["num_rows"], found["prefix_tokens"], found["own_tokens"], found["new_tokens"]) == (5, 40, 3, 4)


def test_the_kernel_command_gives_every_operation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if load_kernels() is None:
        pytest.skip("no native kernels here")
    timings = [kernels.KernelTiming(op="x", num_rows=1, tokens_per_row=1, native_ms=1.0, torch_ms=None, floor_ms=0.5)]
    monkeypatch.setattr(kernels, "time_kernels", lambda found, *, dtype, context, repeats: timings * repeats)
    assert run_module(kernels.command, ["--repeats", "3", "--json"]) == 0
    assert len(json_line(capsys)) == 3


def test_the_kernel_command_refuses_a_dtype_that_the_kernels_lack(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module(kernels.command, ["--dtype", "float16"]) == BAD_CONFIG
    assert "do not compute in float16" in capsys.readouterr().err


def test_names_are_separated_by_commas() -> None:
    assert names("none, suffix") == ("none", "suffix")


def test_a_users_error_is_a_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong_config() -> None:
        engine_config({"dtype": "float8"})

    def no_model() -> None:
        raise ModelError("no such model")

    assert run_module(wrong_config, []) == 2
    assert "dtype" in capsys.readouterr().err
    assert run_module(no_model, []) == 1
    assert capsys.readouterr().err == "no such model\n"
    assert run_module(no_model, ["--nonsense"]) == 2
