"""The whole training command on tiny targets: better drafts, the same loss curve after a kill, another night's job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_batch.batch.engines import ENGINE_FACTORY_VARIABLE
from dspark_batch.bench.nightly import Nights, compare_nights
from dspark_batch.drafters.dspark.checkpoint import read_config
from dspark_batch.errors import ConfigError, OutputError
from dspark_batch.testing.tiny import save_tiny_checkpoint
from dspark_batch.training.config import TrainConfig
from dspark_batch.training.curve import CurvePoint, read_curve
from dspark_batch.training.deadline import Deadline
from dspark_batch.training.pipeline import run_training


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NUM_TOKENS = 41


def small_target(folder: Path) -> None:
    """A target that drafters can learn in seconds: mostly the last token decides, and its choice is clear."""
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": NUM_TOKENS - 1}
    save_tiny_checkpoint(folder, tokenizer=False, vocab_size=NUM_TOKENS, **special)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] *= 0.05
    weights["lm_head.weight"] *= 3.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prompt_table(file: Path, *, num_rows: int = 160) -> None:
    ids = np.random.default_rng(0).integers(0, NUM_TOKENS - 1, (num_rows, 5)).tolist()
    file.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, prompts, and the output of a training over them that ended with the responses."""
    folder = tmp_path_factory.mktemp("data")
    small_target(folder / "target")
    prompt_table(folder / "prompts.jsonl")
    assert run_training(config(training_values(folder, folder)), last_stage="responses")
    return folder


def training_values(folder: Path, data: Path, **optimize: Any) -> dict[str, Any]:
    """A training of seconds in ``folder``, over prompts of random tokens."""
    prompts = {"input": {"path": str(data / "prompts.jsonl")}, "prompt": {"token_ids": "ids"}}
    return {
        "model": {"target": str(data / "target"), "dtype": "float32"},
        "prompts": {"table": prompts},
        "responses": {"max_new_tokens": 40, "temperatures": [0.0], "rows_per_part": 64},
        "drafter": {"block_size": 4, "taps": [0, 1], "markov_rank": 32, "draft_vocab_size": NUM_TOKENS - 7},
        "optimize": {
            "num_steps": 200,
            "anchors_per_step": 128,
            "learning_rate": 1e-2,
            "ce_weight": 1.0,
            "distance_weight": 0.3,
            "log_every": 5,
            "save_every": 10,
            **optimize,
        },
        "evaluate": {"temperatures": [0.0, 0.7], "max_new_tokens": 40, "num_heldout_prompts": 12},
        "run": {"device": "cpu", "train_dtype": "float32", "max_concurrency": 64, "kv_cache_gib": 0.05},
        "output": str(folder / "out"),
    }


def config(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate(values)


def with_responses(values: dict[str, Any], data: Path) -> dict[str, Any]:
    """The training goes on from the responses of ``data``."""
    output = Path(values["output"])
    output.mkdir()
    for name in ("data.json", "prompts", "responses"):
        (output / name).symlink_to(data / "out" / name)
    return values


def card(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "drafter" / "card.json").read_text())
    return loaded


def greedy_length(folder: Path) -> float:
    return next(a["accepted_length"] for a in card(folder)["acceptance"] if a["temperature"] == 0)


def losses(points: list[CurvePoint]) -> list[tuple[int, float, float]]:
    return [(p.step, p.loss, p.distance) for p in points]


def test_training_raises_the_accepted_length_well_above_an_untrained_drafter(tmp_path: Path, data: Path) -> None:
    values = training_values(tmp_path, data)
    untrained = with_responses({**values, "output": str(tmp_path / "untrained")}, data)
    untrained["optimize"] = {**values["optimize"], "num_steps": 1, "learning_rate": 1e-9}
    assert run_training(config(values))
    assert run_training(config(untrained))
    before, after = greedy_length(tmp_path / "untrained"), greedy_length(tmp_path / "out")
    assert before < 2.0
    assert after > before + 1.0
    made = card(tmp_path / "out")
    assert made["num_steps"] == 200
    assert made["data"]["draft_vocab_coverage"] > 0.8
    assert made["calibration"]["temperatures"] == list(
        read_config(tmp_path / "out" / "drafter").confidence_temperatures
    )
    assert made["positions_per_s"] > 0
    page = (tmp_path / "out" / "drafter" / "CARD.md").read_text()
    assert "Accepted length" in page
    points = read_curve(tmp_path / "out" / "training" / "curve.jsonl")
    assert points[-1].loss < 0.7 * points[0].loss
    # The next training may go on from this drafter.
    again = with_responses({**values, "output": str(tmp_path / "again")}, data)
    again["start_from"] = str(tmp_path / "out" / "drafter")
    again["optimize"] = {**values["optimize"], "num_steps": 5, "learning_rate": 1e-4}
    assert run_training(config(again), last_stage="train")
    assert read_curve(tmp_path / "again" / "training" / "curve.jsonl")[0].loss < 1.1 * points[-1].loss


def killed_run(values: dict[str, Any], folder: Path, *, after_step: int) -> None:
    """Start the command, and kill it hard once the loss curve has passed ``after_step``."""
    file = folder / "train.json"
    file.write_text(json.dumps(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "dspark_batch.training.run", str(file), "--until", "train"]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    curve = Path(values["output"]) / "training" / "curve.jsonl"
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end and process.poll() is None:
            points = read_curve(curve)
            if points and points[-1].step >= after_step:
                break
            time.sleep(0.01)
        assert process.poll() is None, "the training ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_training_goes_on_with_the_same_loss_curve(tmp_path: Path, data: Path) -> None:
    values = with_responses(training_values(tmp_path, data, num_steps=300, anchors_per_sequence=7), data)
    killed_run(values, tmp_path, after_step=25)
    stopped = read_curve(tmp_path / "out" / "training" / "curve.jsonl")
    assert stopped[-1].step < 300
    ticks = iter(range(10_000))
    some_more = Deadline(end_s=8.0, clock=lambda: float(next(ticks)))
    assert not run_training(config(values), deadline=some_more, last_stage="train")
    resumed = read_curve(tmp_path / "out" / "training" / "curve.jsonl")
    assert stopped[0].step <= 25 < resumed[-1].step < 300
    # The same data, trained without a break as far as the broken run got.
    whole = with_responses({**values, "output": str(tmp_path / "whole")}, data)
    clock = iter(range(10_000))
    limit = Deadline(end_s=float(len(resumed) - 1), clock=lambda: float(next(clock)))
    run_training(config(whole), deadline=limit, last_stage="train")
    expected = losses(read_curve(tmp_path / "whole" / "training" / "curve.jsonl"))
    got = losses(resumed)
    assert len(got) >= 8
    assert [step for step, _, _ in got] == [step for step, _, _ in expected[: len(got)]]
    for ours, theirs in zip(got, expected, strict=False):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_other_settings_never_go_on_from_a_saved_state_or_mix_their_data(tmp_path: Path, data: Path) -> None:
    values = with_responses(training_values(tmp_path, data, num_steps=10), data)
    assert run_training(config(values), last_stage="train")
    other = {**values, "optimize": {**values["optimize"], "learning_rate": 1e-3}}
    with pytest.raises(OutputError, match="other settings"):
        run_training(config(other), last_stage="train")
    mixed = {**values, "responses": {**values["responses"], "max_new_tokens": 9}}
    with pytest.raises(ConfigError, match="choose another"):
        run_training(config(mixed))


def job_of(folder: Path, name: str, prompts: list[list[int]], *, target: Path) -> Path:
    """The config of a local job over ready-made prompts."""
    table = folder / f"{name}.jsonl"
    table.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in prompts))
    fields = {
        "model": {"target": str(target), "dtype": "float32"},
        "input": {"path": str(table)},
        "prompt": {"token_ids": "ids"},
        "sampling": {"max_new_tokens": 40},
        "engine": {"backend": "local", "device": "cpu", "kv_cache_gib": 0.05},
        "output": {"path": str(folder / f"{name}-out"), "token_ids": True},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(fields))
    return file


def test_a_drafter_trained_on_one_jobs_output_does_better_on_the_next_job(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENGINE_FACTORY_VARIABLE, raising=False)  # Spark sessions of other tests keep theirs
    values = with_responses(training_values(tmp_path, data, num_steps=1, learning_rate=1e-9), data)
    run_training(config(values), last_stage="train")
    prompts = np.random.default_rng(7).integers(0, NUM_TOKENS - 1, (120, 5)).tolist()
    nights = Nights(
        first=job_of(tmp_path, "first", prompts[:100], target=data / "target"),
        next_job=job_of(tmp_path, "next", prompts[100:], target=data / "target"),
        output=tmp_path / "nightly",
        drafter=tmp_path / "out" / "drafter",
        num_steps=150,
        anchors_per_step=128,
        learning_rate=4e-3,
        num_prompts=16,
    )
    found = compare_nights(nights)
    assert found.before.num_prompts == found.after.num_prompts == 16
    assert found.after.accepted_length > found.before.accepted_length + 0.5
