"""The cost table of a loaded model: measured once, kept, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.base import Committed, DraftRow
from dspark_batch.drafters.dspark.drafter import DSparkDrafter
from dspark_batch.drafters.hybrid import HybridDrafter
from dspark_batch.drafters.none import NoDrafter
from dspark_batch.drafters.suffix import SuffixDrafter
from dspark_batch.engine import step_profile
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.engine.step_profile import cost_table, measure_table
from dspark_batch.metrics import PlanReason
from dspark_batch.models.draft_parts import RunnerParts
from dspark_batch.models.loader import LoadedTarget
from dspark_batch.scheduling.cost_table import CostTable
from dspark_batch.testing.scripted_target import ScriptedModel
from dspark_batch.testing.tiny import load_tiny, save_tiny_checkpoint
from dspark_batch.testing.tiny_drafter import random_drafter, tiny_drafter_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    return load_tiny(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path))
    return tmp_path / "costs"


def test_the_table_is_measured_once_and_read_from_then_on(
    tiny: LoadedTarget, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(max_concurrency=4, max_step_tokens=16)
    drafter = SuffixDrafter()
    free = tiny.target.kv.num_free_tokens
    table = cost_table(tiny.target, drafter, config, target_fingerprint="tiny")
    assert table is not None
    assert tiny.target.kv.num_free_tokens == free
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(step_profile, "measure_table", lambda *a, **k: pytest.fail("measured again"))
    assert cost_table(tiny.target, drafter, config, target_fingerprint="tiny") == table
    with pytest.raises(pytest.fail.Exception):
        cost_table(tiny.target, drafter, config, target_fingerprint="another")
    with pytest.raises(pytest.fail.Exception):
        cost_table(tiny.target, drafter, config, target_fingerprint="tiny", measure_anew=True)


def test_a_damaged_file_is_measured_anew_and_replaced(tiny: LoadedTarget, cache: Path) -> None:
    config = EngineConfig(max_concurrency=1, max_step_tokens=16)
    cost_table(tiny.target, NoDrafter(), config, target_fingerprint="tiny")
    (file,) = cache.iterdir()
    file.write_text("{")
    table = cost_table(tiny.target, NoDrafter(), config, target_fingerprint="tiny")
    assert isinstance(table, CostTable)
    assert file.read_text() != "{"


def test_a_target_that_is_no_loaded_model_has_no_table(cache: Path) -> None:
    assert cost_table(ScriptedModel().target, NoDrafter(), EngineConfig(), target_fingerprint="x") is None
    assert not cache.exists()


def test_sizes_stay_within_the_memory_and_the_step(tiny: LoadedTarget) -> None:
    table = measure_table(tiny.target, SuffixDrafter(), most_rows=64, max_step_tokens=48, budget_s=0.1)
    assert table is not None
    assert max(step.num_tokens for step in table.steps) <= 48
    assert table.drafts == ()


def test_an_engine_measures_before_its_first_row_and_then_schedules_by_it(tiny: LoadedTarget, cache: Path) -> None:
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    with BatchEngine(tiny, EngineConfig(drafter="suffix", max_concurrency=2)) as engine:
        assert len(list(cache.iterdir())) == 1
        list(engine.generate([Request(id=str(i), prompt_token_ids=(i, 5, 6), sampling=sampling) for i in range(4)]))
        assert engine.stats.num_steps_by_reason
        assert PlanReason.NO_TABLE not in engine.stats.num_steps_by_reason


def test_a_drafter_with_a_forward_is_timed_and_left_as_it_was(tiny: LoadedTarget) -> None:
    spec = tiny.target.spec
    config = tiny_drafter_config(vocab_size=spec.vocab_size, hidden_size=spec.hidden_size)
    drafter = DSparkDrafter(random_drafter(config), RunnerParts(tiny.target, fingerprint="tiny"))
    table = measure_table(tiny.target, drafter, most_rows=4, max_step_tokens=64, budget_s=0.1)
    assert table is not None
    gamma = drafter.max_draft_tokens
    assert {(d.num_rows, d.num_tokens) for d in table.drafts} == {(rows, gamma) for rows in (1, 4)}
    drafter.check_integrity()
    assert drafter.cache.num_rows == 0


def test_measuring_teaches_a_drafter_nothing(tiny: LoadedTarget) -> None:
    """The tokens that follow a timed draft are nobody's choice."""
    spec = tiny.target.spec
    config = tiny_drafter_config(vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, has_confidence=False)
    fresh, measured = (
        HybridDrafter(SuffixDrafter(), DSparkDrafter(random_drafter(config), RunnerParts(tiny.target, fingerprint="t")))
        for _ in range(2)
    )
    assert measure_table(tiny.target, measured, most_rows=4, max_step_tokens=64, budget_s=0.1) is not None
    tokens = [10, 20, 30, 40]
    features = torch.zeros(3, len(fresh.taps) * spec.hidden_size)
    drafts = []
    for drafter in (fresh, measured):
        row = DraftRow(0, 0, SamplingParams(max_new_tokens=20), tokens, 3)
        drafter.add(row)
        drafter.observe([Committed(row, 0, 3, 0)], features)
        drafts.append(drafter.propose([row], [4]))
    assert drafts[0].token_ids[0]
    assert drafts[0].confidence == drafts[1].confidence
