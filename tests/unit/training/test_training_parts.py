"""Config files, initial weights, learning rates, arithmetic, curves, saved rows and the search for shipped drafters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_batch.drafters.dspark.checkpoint import expected_shapes
from dspark_batch.drafters.dspark.embedded import embedded_drafter
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.testing.tiny_drafter import tiny_drafter_config
from dspark_batch.testing.tiny_training import random_rows, tiny_teacher
from dspark_batch.training.arithmetic import drafter_flops
from dspark_batch.training.config import DrafterSection, OptimizeSection, ResponsesSection
from dspark_batch.training.curve import CURVE_FILE, CurveFile, CurvePoint, draw_curve, read_curve
from dspark_batch.training.initial import draft_vocabulary, drafter_config, initial_tensors, spread_taps
from dspark_batch.training.load import load_train_config
from dspark_batch.training.optimizer import learning_rate
from dspark_batch.training.responses import missing_parts, part_file
from dspark_batch.training.sequences import read_rows, rows_with_prompts, token_row, usable_rows, write_rows

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["train_smollm2.yaml", "train_smollm2_cpu.yaml"])
def test_shipped_configs_are_valid_and_take_overrides(name: str) -> None:
    config = load_train_config(CONFIGS / name, overrides=["optimize.num_steps=7", "output=elsewhere"])
    assert (config.optimize.num_steps, config.output) == (7, "elsewhere")
    assert config.engine_config().drafter == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"output": "x", "prompts": {}}', "at least one of"),
        ('{"output": "x", "prompts": {"job": "j"}, "optimise": {}}', "optimise"),
        ('{"output": "x", "prompts": {"job": "j"}, "optimize": {"save_every": 7}}', "multiple of"),
        ("[1]", "mapping"),
        ("{", "cannot be read"),
    ],
)
def test_wrong_configs_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_train_config(file)


def test_the_draft_vocabulary_is_the_most_frequent_response_tokens() -> None:
    rows = [token_row("a", [9, 9, 9, 9], [5, 3, 5, 1]), token_row("b", [2], [5, 1, 7])]
    ids = draft_vocabulary(rows, vocab_size=12, draft_vocab_size=3)
    assert ids is not None
    assert ids.tolist() == [1, 3, 5]
    assert draft_vocabulary(rows, vocab_size=12, draft_vocab_size=12) is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_drafter_starts_from_the_targets_last_layers(tmp_path: Path, family: str) -> None:
    loaded = tiny_teacher(tmp_path / "m", family=family)
    spec, rows = loaded.teacher.spec, random_rows([(3, 9)])
    config = drafter_config(
        DrafterSection(draft_vocab_size=60), spec, rope=loaded.teacher.rope_fields, rows=rows, fingerprint="f"
    )
    tensors = initial_tensors(config, spec, folder=loaded.folder, seed=0)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(config)
    assert (config.target_fingerprint, config.num_target_layers) == ("f", 3)
    assert config.mask_token_id not in rows[0].token_ids[rows[0].prompt_len :]
    again = initial_tensors(config, spec, folder=loaded.folder, seed=0)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    from safetensors.torch import load_file

    stored = load_file(loaded.folder / "model.safetensors")
    torch.testing.assert_close(tensors["layers.1.mlp.up_proj.weight"], stored["model.layers.2.mlp.up_proj.weight"])
    assert not tensors["markov_head.markov_w2.weight"].any()


def test_taps_that_the_target_does_not_have_are_refused(tmp_path: Path) -> None:
    loaded = tiny_teacher(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"drafter\.taps"):
        drafter_config(
            DrafterSection(taps=[2]), loaded.teacher.spec, rope={}, rows=random_rows([(1, 3)]), fingerprint="f"
        )


@pytest.mark.parametrize(("num_layers", "expected"), [(30, (1, 14, 27)), (3, (0,)), (5, (1, 2)), (36, (1, 17, 33))])
def test_taps_are_spread_over_the_depth(num_layers: int, expected: tuple[int, ...]) -> None:
    assert spread_taps(num_layers) == expected


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_warms_up_and_falls_to_its_last_part(decay: str) -> None:
    config = OptimizeSection.model_validate(
        {"num_steps": 100, "warmup_fraction": 0.1, "decay": decay, "learning_rate": 1.0, "final_fraction": 0.1}
    )
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)


def test_a_late_decay_holds_the_rate_until_the_last_part() -> None:
    config = OptimizeSection.model_validate(
        {"num_steps": 100, "warmup_fraction": 0.0, "decay": "late", "late_fraction": 0.2, "learning_rate": 1.0}
    )
    rates = [learning_rate(step, config) for step in range(100)]
    assert set(rates[:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_prompts_join_the_response_past_what_all_rows_share() -> None:
    rows = [token_row("a", [7, 8, 1, 2], [3]), token_row("b", [7, 8, 1], [4, 5]), token_row("c", [7, 8, 9, 9], [1])]
    assert [(r.prompt_len, len(r.token_ids)) for r in rows_with_prompts(rows)] == [(2, 5), (2, 5), (2, 5)]
    assert [r.prompt_len for r in rows_with_prompts(rows[:1])] == [4]
    assert [r.prompt_len for r in rows_with_prompts([*rows, token_row("d", [6, 6], [1])])] == [1, 1, 1, 1]


def test_flops_are_six_per_trained_weight_four_per_frozen_one_and_attention() -> None:
    config = tiny_drafter_config(taps=(0,))
    h, i, q, kv = 48, 56, 60, 20
    layer = h * (q + 2 * kv) + q * h + 3 * h * i
    slots, seen = 6 * (2 * layer + 61 * 7) + 4 * 61 * h, 6 * 2 * 2 * q * 5
    one = drafter_flops(config, num_slots=1, slots_per_block=5, num_context_tokens=0, num_attended=0)
    assert one == slots + seen
    context = drafter_flops(config, num_slots=0, slots_per_block=5, num_context_tokens=1, num_attended=0)
    assert context == 6 * (h * h + 2 * 2 * h * kv)
    assert drafter_flops(config, num_slots=0, slots_per_block=5, num_context_tokens=0, num_attended=1) == seen


def point(step: int) -> CurvePoint:
    return CurvePoint(
        step=step,
        loss=1.0 / step,
        ce=1.0,
        soft_ce=1.0,
        distance=1.0,
        confidence=0.5,
        acceptance=(0.5, 0.2),
        hits=(0.6, 0.3),
        estimated_length=1.78,
        learning_rate=1e-3,
        gradient_norm=1.0,
        num_positions=10,
        flops=1e6,
        elapsed_s=float(step),
    )


def test_points_past_the_saved_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / CURVE_FILE
    curve = CurveFile(file, step=0)
    for step in (10, 20, 30):
        curve.append(point(step))
    with file.open("a") as stream:
        stream.write('{"step": 40, "lo')
    assert [p.step for p in read_curve(file)] == [10, 20, 30]
    CurveFile(file, step=20).append(point(25))
    assert read_curve(file) == [point(10), point(20), point(25)]


def test_the_curve_is_drawn_where_matplotlib_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_curve([point(1), point(2)], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_saved_rows_come_back_and_damaged_parts_are_named(tmp_path: Path) -> None:
    rows = random_rows([(3, 4), (1, 2)])
    section = ResponsesSection(rows_per_part=1)
    write_rows(part_file(tmp_path, 1), rows[1:])
    assert missing_parts(rows, section, tmp_path) == [0]
    write_rows(part_file(tmp_path, 0), rows[:1])
    found = read_rows(tmp_path)
    assert [(r.id, r.prompt_len, r.token_ids.tolist()) for r in found] == [
        (r.id, r.prompt_len, r.token_ids.tolist()) for r in rows
    ]
    part_file(tmp_path, 1).write_bytes(b"no")
    with pytest.raises(InputError, match="part-00001"):
        read_rows(tmp_path)


def test_rows_are_cut_and_those_without_an_anchor_left_out() -> None:
    rows = random_rows([(3, 9), (6, 4), (2, 1)])
    assert [(r.id, len(r.token_ids)) for r in usable_rows(rows, max_tokens=7)] == [("r0", 7)]
    assert np.array_equal(usable_rows(rows, max_tokens=7)[0].token_ids, rows[0].token_ids[:7])


def test_an_embedded_drafter_is_found_by_its_targets_fingerprint(tmp_path: Path) -> None:
    for name, fingerprint in (("one", "aa"), ("two", "bb")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"target_fingerprint": fingerprint}))
    assert embedded_drafter("bb", folder=tmp_path) == tmp_path / "two"
    assert embedded_drafter("cc", folder=tmp_path) is None
