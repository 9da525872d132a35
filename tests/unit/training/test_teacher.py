"""Whole-row passes against the served target, and the bound on kept features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import UnsupportedModelError
from dspark_batch.models.loader import load_target
from dspark_batch.tensors import ForwardBatch, RowSlice
from dspark_batch.testing.tiny_training import random_rows, tiny_teacher
from dspark_batch.training.teacher import TaughtRows

ROWS = random_rows([(3, 9), (5, 1), (1, 17), (7, 11)])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_features_outputs_and_normalisers_are_those_of_the_served_target(tmp_path: Path, family: str) -> None:
    loaded = tiny_teacher(tmp_path / "m", family=family)
    taps = (-1, 0, 1)
    taught = loaded.teacher.teach(ROWS, taps=taps)
    served = load_target(EngineConfig(target=str(tmp_path / "m"), dtype="float32", kv_cache_gib=0.01)).target
    for row, ours in zip(ROWS, taught, strict=True):
        size = len(row.token_ids)
        slot = served.kv.allocate(size)
        assert slot is not None
        batch = ForwardBatch(
            torch.from_numpy(row.token_ids).long(), (RowSlice(slot, 0, size),), torch.arange(size), taps
        )
        out = served.forward(batch)
        assert out.features is not None
        torch.testing.assert_close(ours.features, out.features, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(ours.hidden, out.hidden[row.prompt_len :], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(
            ours.log_z, served.logits(out.hidden[row.prompt_len :]).logsumexp(-1), atol=2e-4, rtol=2e-4
        )
        served.kv.free(slot)


def test_head_rows_are_read_through_an_untied_head(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "m").teacher
    rows = teacher.head_rows(torch.tensor([5, 0, 271]))
    x = torch.randn(4, teacher.spec.hidden_size)
    torch.testing.assert_close(x @ rows.T, (x @ teacher.head_rows(None).T)[:, [5, 0, 271]])
    assert teacher.head_rows(None).shape == (272, 48)


def test_kept_features_stay_within_the_bound_and_all_rows_come_out_the_same(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "m").teacher
    whole = teacher.teach(ROWS, taps=(0,))
    limit = whole[0].num_bytes + whole[1].num_bytes
    taught = TaughtRows(teacher, ROWS, taps=(0,), limit_bytes=limit)
    for numbers in ([0, 1], [2, 0, 2], [3, 1]):
        for number, row in zip(numbers, taught.get(numbers), strict=True):
            torch.testing.assert_close(row.features, whole[number].features, atol=1e-5, rtol=1e-5)
        taught.check_integrity()
    tokens = [len(row.token_ids) for row in ROWS]
    assert taught.num_computed_tokens == sum(tokens), "kept rows are not computed again, and a row once per call"
    taught.get([2])
    assert taught.num_computed_tokens == sum(tokens) + tokens[2]


def test_a_window_shorter_than_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window of 32"):
        tiny_teacher(tmp_path / "m", family="mistral", sliding_window=32)
