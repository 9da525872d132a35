"""The benches of the schedule, end to end over a scripted target; the simulator's command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_batch.bench import calibration
from dspark_batch.bench.scheduler import (
    BUILT_IN_PROMPTS,
    Comparison,
    LastingPolicy,
    Plan,
    run_scheduler_bench,
)
from dspark_batch.cli import run_cli
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError
from dspark_batch.scheduling.cost_table import CostTable
from dspark_batch.scheduling.policies import FixedLength, RoundLoad
from dspark_batch.scheduling.traces import TraceRecorder, read_trace
from dspark_batch.tensors import DraftBlock
from dspark_batch.testing.scripted_target import LetterCodec, ScriptedModel, ScriptedTarget


@pytest.fixture
def scripted_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: EngineConfig) -> ScriptedModel:
        target = ScriptedTarget(vocab_size=len(LetterCodec.alphabet), contrast=8.0)
        return ScriptedModel(target=target, codec=LetterCodec(), eos_token_ids=frozenset())

    monkeypatch.setattr("dspark_batch.models.loader.load_target", load)


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Chats and repetitions in letters that the scripted codec knows; also in place of the built-in set."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"turns": [f"abc de {letter}"]} for letter in "fghij"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built_in = tmp_path / "built_in.jsonl"
    code = [{"prompt": f"xy{letter} xy{letter} xy"} for letter in "abc"]
    built_in.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *code]))
    monkeypatch.setattr("dspark_batch.bench.scheduler.BUILT_IN_PROMPTS", built_in)
    monkeypatch.setattr("dspark_batch.bench.scheduler._NUM_BUILT_IN_CHATS", len(rows))
    return path


@pytest.mark.usefixtures("scripted_loader")
def test_the_command_ends_with_one_object_of_points_job_and_mixed(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompts", str(prompts), "--concurrency", "1,3", "--lengths", "1,2", "--repeats", "1"]
    small = ["--max-new-tokens", "8", "--job-concurrency", "2", "--drafter", "suffix", "--warm-up-s", "0.1", "--json"]
    assert run_cli(["bench", "scheduler", *arguments, *small]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [point["concurrency"] for point in found["points"]] == [1, 3]
    for comparison in (*found["points"], found["job"], found["mixed"]):
        assert set(comparison["fixed"]) == {"1", "2"}
        assert comparison["best_fixed"] in {"0", "1", "2"}
        assert min(comparison["plain"], comparison["auto"], *comparison["fixed"].values()) > 0
        assert comparison["auto_to_plain"] > 0
        assert comparison["runs"]["plain"][0]["num_drafted_tokens"] == 0
    assert sum(run["num_drafted_tokens"] for name in ("job", "mixed") for run in found[name]["runs"]["2"]) > 0
    assert len(found["points"][0]["runs"]["auto"]) == 6
    assert found["job"]["num_rows"] == 4
    assert {"versions", "device", "commit", "plan"} <= found.keys()


@pytest.mark.usefixtures("scripted_loader")
def test_all_settings_of_a_repeat_decode_the_same_rows(prompts: Path) -> None:
    plan = Plan(
        engine=EngineConfig(drafter="suffix"),
        prompts=prompts,
        concurrencies=(2,),
        lengths=(2,),
        repeats=2,
        max_new_tokens=6,
        job_concurrency=2,
        warm_up_s=0.0,
    )
    lines: list[str] = []
    report = run_scheduler_bench(plan, tell=lines.append)
    assert len(lines) == 3 * (12 + 6 + 6)
    assert report.job is not None
    assert report.mixed is not None
    for found, num_tokens in ((report.points[0], 12), (report.job, None), (report.mixed, None)):
        for repeat in zip(*found.runs.values(), strict=True):
            assert len({run.num_emitted_tokens for run in repeat}) == 1
            assert len({run.num_prompt_tokens for run in repeat}) == 1
            assert num_tokens is None or repeat[0].num_emitted_tokens == num_tokens
    # The rows of both jobs have lengths of their own, with the asked mean over eight rows.
    assert report.job.runs["plain"][0].tail_s > 0
    assert report.table().row_count == 3


@pytest.mark.usefixtures("scripted_loader")
def test_lengths_beyond_what_the_drafter_drafts_share_their_runs(prompts: Path) -> None:
    engine = EngineConfig(drafter="ngram", max_draft_tokens=3)
    plan = Plan(
        engine=engine,
        prompts=prompts,
        concurrencies=(2,),
        lengths=(1, 3, 5, 7),
        repeats=1,
        max_new_tokens=6,
        has_jobs=False,
        warm_up_s=0.1,
    )
    told: list[str] = []
    (point,) = run_scheduler_bench(plan, tell=told.append).points
    assert point.runs["3"] == point.runs["5"] == point.runs["7"] != point.runs["1"]
    assert not any(", 5:" in line or ", 7:" in line for line in told)


def test_ratios_are_medians_of_ratios_within_a_repeat() -> None:
    class Run:
        def __init__(self, rate: float) -> None:
            self.tokens_per_s = rate

    runs = {"plain": (10, 20, 30), "auto": (12, 22, 90), "3": (11, 10, 10)}
    found = Comparison(
        concurrency=1,
        num_rows=1,
        runs={name: tuple(Run(rate) for rate in rates) for name, rates in runs.items()},  # type: ignore[misc]
    )
    assert found.best_fixed == "plain"
    assert found.ratio("auto", to="plain") == pytest.approx(1.2)


def test_a_lasting_policy_gives_the_rows_of_later_engines_new_handles() -> None:
    recorder = TraceRecorder(FixedLength(1))
    policy = LastingPolicy(recorder)
    for _ in range(2):
        policy.begin()
        for handles in ([0, 1], [1, 2]):
            load = RoundLoad(handles=handles, limits=[3, 3], num_prefill_tokens=0, num_queued=0)
            policy.draft_lengths(load)
            assert policy.verify_plan(load, DraftBlock(token_ids=[[1], [1]])).verify_len == [1, 1]
            assert policy._renamed(load).handles[0] >= 0
    assert policy._renamed(load).handles == [4, 5]


def test_lengths_must_be_positive_and_options_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--lengths"):
        Plan(engine=EngineConfig(), lengths=(0, 1))
    assert run_cli(["bench", "scheduler", "--concurrency", "x"]) == 2
    assert run_cli(["bench", "scheduler", "--drafter", "magic"]) == 2
    assert "drafter" in capsys.readouterr().err


def test_the_built_in_prompts_are_chats_and_code_that_is_asked_for_again() -> None:
    rows = [json.loads(line) for line in BUILT_IN_PROMPTS.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["chat"] * 32 + ["code"] * 16
    for row in rows[32:]:
        assert row["prompt"].count("```python\n") == 2
        assert row["prompt"].endswith("```python\n")


@pytest.mark.usefixtures("scripted_loader")
def test_the_calibration_bench_reports_estimators_and_writes_trace_and_plot(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    trace, plot = tmp_path / "trace.jsonl", tmp_path / "plot.png"
    arguments = ["--prompts", str(prompts), "--rows", "20", "--max-new-tokens", "20", "--drafter", "suffix"]
    assert run_cli(["bench", "calibration", *arguments, "--trace", str(trace), "--plot", str(plot), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = [estimator["name"] for estimator in found["estimators"]]
    assert names == ["history", "confidence as stated", "confidence, logistic"]
    for estimator in found["estimators"]:
        assert estimator["positions"][0]["num_rounds"] > 0
        assert 0 <= estimator["positions"][0]["ece"] <= 1
    assert plot.stat().st_size > 1000
    assert sum(len(one.handles) for one in read_trace(trace)) == found["num_row_rounds"]

    replayed = ["--rows", "2", "--context", "short", "--schedules", "plain,auto", "--trace", str(trace)]
    assert run_cli(["bench", "simulate", *replayed]) == 0


def test_the_calibration_bench_is_a_function_of_its_rounds() -> None:
    empty = calibration.judge([], drafter="none", num_positions=0, num_prompts=0, warm_up=0.3)
    assert empty.estimators == ()
    assert empty.table().row_count == 0


def test_the_simulator_compares_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "1,8", "--context", "short", "--schedules", "plain,fixed-3,auto", "--json"]
    assert run_cli(["bench", "simulate", *arguments]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["scenarios"]
    assert [row["concurrency"] for row in found] == [1, 8]
    for row in found:
        assert row["auto_to_plain"] > 1.2
        assert row["best_fixed"] == "fixed-3"
        assert row["runs"]["auto"]["planning_ms_per_step"] > 0
    for option, value in (("--schedules", "fixed-x"), ("--chances", "2"), ("--context", "tall"), ("--rows", "0")):
        assert run_cli(["bench", "simulate", option, value]) == 2
        assert option in capsys.readouterr().err


def test_the_simulator_takes_the_cost_table_of_a_profiled_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = CostTable.from_function(
        lambda tokens, rows, context: 0.010 + 0.0002 * tokens,
        rows=(1, 4, 16),
        draft_s=lambda rows, tokens: 0.001 + 0.0001 * rows,
        draft_tokens=4,
    )
    costs = tmp_path / "costs.txt"
    costs.write_text("tables for people\n" + json.dumps({"key": {}, "table": table.as_dict()}) + "\n")
    arguments = ["--costs", str(costs), "--chances", "0.8,0.7,0.6,0.5", "--rows", "4", "--context", "brief"]
    jobs = ["--known-lengths", "--job-rows", "12", "--repeats", "2", "--schedules", "plain,auto", "--json"]

    def run_of_auto(*more: str) -> dict[str, float]:
        assert run_cli(["bench", "simulate", *arguments, *jobs, *more]) == 0
        (row,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["scenarios"]
        emitted = [row["tokens_per_s"][name] * row["runs"][name]["wall_s"] for name in ("plain", "auto")]
        assert emitted[0] == pytest.approx(emitted[1]), "the same rows"
        found: dict[str, float] = row["runs"]["auto"]
        return found

    exact = run_of_auto()
    assert run_of_auto("--noise", "0.1")["wall_s"] != exact["wall_s"] == run_of_auto()["wall_s"]
    with_planning = run_of_auto("--count-planning")
    assert with_planning["wall_s"] == pytest.approx(
        exact["wall_s"] + exact["planning_share"] * exact["wall_s"], rel=0.3
    )
    assert with_planning["wall_s"] > exact["wall_s"]
    for file, content in ((costs, "no table"), (tmp_path / "absent", None)):
        if content is not None:
            file.write_text(content)
        assert run_cli(["bench", "simulate", *arguments[2:], "--costs", str(file)]) != 0
        assert str(file) in capsys.readouterr().err
