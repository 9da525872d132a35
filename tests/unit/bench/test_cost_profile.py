"""The profile command and the planning bench: what they print, write and refuse. Figures are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from dspark_batch.bench import cost_profile
from dspark_batch.bench.cost_profile import Profile, draft_table, plot_table, step_tables
from dspark_batch.bench.planning_cost import format_costs, planning_cost
from dspark_batch.cli import run_cli
from dspark_batch.engine.config import EngineConfig
from dspark_batch.job.outcome import ExitCode
from dspark_batch.scheduling.cost_cache import CostKey
from dspark_batch.scheduling.cost_table import CostTable

KEY = CostKey(device="a CPU", threads=2, target="abc", dtype="float32", drafter="dspark", versions=("torch 9",))
TABLE = CostTable.from_function(
    lambda t, r, c: 0.01 + 0.001 * t + 1e-6 * r * c,
    rows=(1, 4),
    tokens_per_row=(1, 2),
    contexts=(128, 1024),
    draft_s=lambda r, k: 0.001 * r * k,
    draft_tokens=5,
)
Capture = pytest.CaptureFixture[str]


def shown(*tables: object) -> str:
    console = Console(width=120, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    with console.file:
        for table in tables:
            console.print(table)
    return console.export_text()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, bool]]:
    """The command without a model; what it was asked to measure."""
    calls: list[tuple[EngineConfig, bool]] = []

    def measure(engine: EngineConfig, *, is_fresh: bool = False) -> Profile:
        calls.append((engine, is_fresh))
        return Profile(KEY, TABLE)

    monkeypatch.setattr(cost_profile, "measure_profile", measure)
    return calls


def test_tables_show_every_size_in_milliseconds_and_relative_to_a_plain_step() -> None:
    text = shown(*step_tables(TABLE), draft_table(TABLE))
    assert "step, context 128" in text
    assert "step, context 1024" in text
    assert "14.51" in text
    assert "1.28" in text
    assert "20.00" in text


def test_the_command_prints_the_table_and_on_request_json(
    asked: list[tuple[EngineConfig, bool]], capsys: Capture
) -> None:
    assert run_cli(["profile", "--target", "tiny", "--drafter", "suffix", "--fresh", "--json"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "device: a CPU" in out
    assert json.loads(out.splitlines()[-1]) == {"key": KEY.as_dict(), "table": TABLE.as_dict()}
    engine, is_fresh = asked[0]
    assert (engine.target, engine.drafter, engine.schedule, is_fresh) == ("tiny", "suffix", "auto", True)


def test_a_config_is_read_and_overridden(asked: list[tuple[EngineConfig, bool]], tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("model: {target: tiny, dtype: float32}\nspeculation: {drafter: ngram, schedule: fixed}\n")
    assert run_cli(["profile", str(config), "engine.threads=3"]) == ExitCode.OK
    engine, is_fresh = asked[0]
    assert (engine.target, engine.drafter, engine.threads, engine.schedule) == ("tiny", "ngram", 3, "auto")
    assert not is_fresh


def test_neither_config_nor_target_and_an_unknown_drafter_are_refused(
    asked: list[tuple[EngineConfig, bool]], capsys: Capture
) -> None:
    assert run_cli(["profile"]) == ExitCode.BAD_CONFIG
    assert "CONFIG" in capsys.readouterr().err
    assert run_cli(["profile", "--target", "tiny", "--drafter", "nobody"]) == ExitCode.BAD_CONFIG
    assert "--drafter" in capsys.readouterr().err
    assert asked == []


def test_a_figure_needs_matplotlib_and_says_how_to_get_it(
    asked: list[tuple[EngineConfig, bool]], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_cli(["profile", "--target", "tiny", "--plot", str(tmp_path / "costs.svg")]) == ExitCode.BAD_CONFIG
    assert "dspark-batch[report]" in capsys.readouterr().err
    assert asked == []


def test_the_figure_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "costs.svg"
    plot_table(TABLE, file, title="a title")
    assert "svg" in file.read_text()[:400]


@pytest.mark.parametrize("is_silent", [False, True])
def test_planning_is_timed_for_both_kinds_of_drafter(is_silent: bool) -> None:
    cost = planning_cost(3, draft_tokens=4, is_silent=is_silent, num_rounds=3, step_ms=20.0)
    assert cost.plan_us > 0
    assert cost.learn_us > 0
    assert cost.step_share == pytest.approx(cost.total_us / 20_000)
    lines = format_costs([cost]).splitlines()
    assert len(lines) == 2
    assert ("silent" if is_silent else "talking") in lines[1]
