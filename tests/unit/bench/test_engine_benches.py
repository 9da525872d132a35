"""The engine's own benchmarks run end to end on a tiny random model."""

from __future__ import annotations

import pytest

from dspark_batch.bench import head
from dspark_batch.bench.memory import measure_memory
from dspark_batch.bench.shared_prefix import measure_shared_prefix, prefix_requests
from dspark_batch.bench.step_profile import format_profiles, profile_steps
from dspark_batch.core import Request
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.engine import BatchEngine
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.models.loader import LoadedTarget, load_target
from dspark_batch.models.native import NativeDecoder
from dspark_batch.testing.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = save_tiny_checkpoint(
        tmp_path_factory.mktemp("tiny"), hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96
    )
    return EngineConfig(target=str(path), drafter="none", max_concurrency=8, kv_cache_gib=0.002)


@pytest.fixture(scope="module")
def loaded(config: EngineConfig) -> LoadedTarget:
    return load_target(config)


def test_sharing_a_prefix_changes_no_output_and_skips_its_tokens(loaded: LoadedTarget, config: EngineConfig) -> None:
    requests = prefix_requests(num_rows=11, prefix_tokens=120, own_tokens=5, new_tokens=7, vocab_size=250)
    report = measure_shared_prefix(loaded, config, requests, prefix_tokens=120)
    assert report.outputs_equal
    assert report.num_shared_prefix_tokens == 11 * 120
    assert (report.own_tokens, report.new_tokens) == (5, 7)


def test_the_profile_divides_the_step_into_its_parts(loaded: LoadedTarget) -> None:
    if load_kernels() is None:
        pytest.skip("no native kernels here")
    profiles = profile_steps(loaded, rows=[1, 5], context_tokens=40, num_steps=3)
    assert [p.num_rows for p in profiles] == [1, 5]
    for profile in profiles:
        assert 0 < profile.floor_ms == min(profile.products_ms, profile.onednn_ms) + profile.kv_copy_ms
        assert profile.floor_share == pytest.approx(profile.floor_ms / profile.step_ms)
    assert len(format_profiles(profiles).splitlines()) == 3


def test_the_head_is_timed_with_all_logits_and_with_few_and_left_as_it_was(loaded: LoadedTarget) -> None:
    if load_kernels() is None:
        pytest.skip("no native kernels here")
    decoder = loaded.target.decoder
    assert isinstance(decoder, NativeDecoder)
    before = decoder.draws.product_argmax
    prompt = Request(id="0", prompt_token_ids=(1, 2, 3))
    found = head.profile_head(loaded, [prompt], num_rows=3, num_steps=2)
    assert found.num_rows == 3
    assert 0 < found.all_ms < found.step_all_ms
    assert 0 < found.few_ms < found.step_few_ms
    assert decoder.draws.product_argmax is before
    assert len(head.format_profiles([found]).splitlines()) == 2


def test_the_memory_report_samples_evenly_and_sees_all_kv_given_back(
    loaded: LoadedTarget, config: EngineConfig
) -> None:
    with BatchEngine(loaded, config) as engine:
        report = measure_memory(engine, loaded.target, num_requests=60, num_samples=4, warm_up_requests=20)
    assert [done for done, _ in report.resident_mib] == [20, 30, 40, 50, 60]
    assert 0 < report.most_kv_tokens <= report.kv_tokens
