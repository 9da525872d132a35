"""Features kept while responding equal those that training computes, and are used in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, InputError
from dspark_batch.testing.tiny_training import random_rows, tiny_teacher
from dspark_batch.training.config import ResponsesSection
from dspark_batch.training.deadline import Deadline
from dspark_batch.training.features import FeatureFiles
from dspark_batch.training.generation import open_generator
from dspark_batch.training.responses import features_file, generate_responses
from dspark_batch.training.sequences import TokenRow, read_rows, token_row
from dspark_batch.training.teacher import TaughtRows

SECTION = ResponsesSection(max_new_tokens=7, temperatures=[0.0, 0.9], rows_per_part=3, kept_taps=[0])


def prompts() -> list[TokenRow]:
    shared = random_rows([(20, 1)])[0].token_ids[:20].tolist()
    return [token_row(f"p{i}", [*shared, i, i + 3], []) for i in range(5)]


def engine_config(folder: Path) -> EngineConfig:
    return EngineConfig(
        target=str(folder), dtype="float32", drafter="none", schedule="off", kv_cache_gib=0.01, max_step_tokens=40
    )


def test_kept_features_stand_in_for_the_targets_own_passes(tmp_path: Path) -> None:
    loaded = tiny_teacher(tmp_path / "m")
    with open_generator(engine_config(tmp_path / "m"), kept_taps=SECTION.kept_taps) as generator:
        generate_responses(prompts(), SECTION, generator, folder=tmp_path / "out", deadline=Deadline())
    rows = read_rows(tmp_path / "out")
    assert features_file(tmp_path / "out", 1).is_file()
    files = FeatureFiles(tmp_path / "out")
    kept = TaughtRows(loaded.teacher, rows, taps=(0,), limit_bytes=0, files=files)
    whole = loaded.teacher.teach(rows, taps=(0,))
    for row, ours, theirs in zip(rows, kept.get(range(len(rows))), whole, strict=True):
        known = len(row.token_ids) - 1
        torch.testing.assert_close(ours.features[:known], theirs.features[:known], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(ours.hidden[:-1], theirs.hidden[:-1], atol=2e-4, rtol=2e-4)
        assert ours.hidden.shape == theirs.hidden.shape
        assert ours.log_z is None
    assert kept.num_computed_tokens == 0
    # A layer that was not kept has to be computed, and so have rows that were not.
    assert files.get(rows[0].id, taps=(1,)) is None
    other = TaughtRows(loaded.teacher, [*rows, *random_rows([(2, 3)])], taps=(0,), limit_bytes=0, files=files)
    assert other.get([0, len(rows)])[1].log_z is not None
    assert other.num_computed_tokens == 5


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    features_file(tmp_path, 3).write_bytes(b"no")
    with pytest.raises(InputError, match="features-00003"):
        FeatureFiles(tmp_path)


def test_layers_that_the_target_does_not_have_cannot_be_kept(tmp_path: Path) -> None:
    tiny_teacher(tmp_path / "m")
    with (
        pytest.raises(ConfigError, match="kept_taps"),
        open_generator(engine_config(tmp_path / "m"), kept_taps=[9]),
    ):
        pass
