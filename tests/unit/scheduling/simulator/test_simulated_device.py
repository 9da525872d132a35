"""The roofline against sums by hand, and what must hold whatever the figures."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_batch.scheduling.cost_table import CostTable, DraftSample, StepSample
from dspark_batch.scheduling.simulator.device import H100, QWEN3_8B, ProfiledDevice, RooflineDevice, StepWork


def work(num_rows: int, per_row: int = 1, context: int = 0) -> StepWork:
    num_tokens = num_rows * per_row
    return StepWork(
        num_rows=num_rows, num_tokens=num_tokens, num_logits=num_tokens, num_context_tokens=num_rows * context
    )


def test_the_model_has_the_weights_and_the_cache_of_the_published_one() -> None:
    assert QWEN3_8B.num_product_weights + QWEN3_8B.num_head_weights == pytest.approx(8.19e9, rel=0.01)
    assert QWEN3_8B.kv_bytes_per_token == 147_456


def test_one_row_is_bound_by_the_weights_and_a_prefill_by_arithmetic() -> None:
    device = RooflineDevice()
    weights_s = 2 * 7.57e9 / (3.35e12 * 0.85)
    assert device.step_s(work(1)) == pytest.approx(weights_s + H100.step_overhead_s, rel=0.01)
    prefill = StepWork(num_rows=1, num_tokens=4096, num_logits=1, num_context_tokens=0)
    assert device.step_s(prefill) == pytest.approx(2 * 7.57e9 * 4096 / (989e12 * 0.65) + 1e-3, rel=0.01)


def test_more_tokens_are_free_until_the_ridge_and_then_cost_by_tiles() -> None:
    device = RooflineDevice()
    at = {
        n: device.step_s(StepWork(num_rows=1, num_tokens=n, num_logits=0, num_context_tokens=0)) for n in range(1, 900)
    }
    ridge = next(n for n in range(1, 900) if at[n] > at[1])
    assert 150 < ridge < 350
    assert all(at[n] <= at[n + 1] for n in range(1, 899))
    assert at[641] == at[704] < at[705]


def test_long_contexts_cost_bytes_once_per_row_however_many_of_its_tokens_are_verified() -> None:
    device = RooflineDevice()
    plain, verify = device.step_s(work(16, 1, 16_384)), device.step_s(work(16, 8, 16_384))
    assert plain > 2 * device.step_s(work(16))
    assert verify < 1.1 * plain


def test_a_card_holds_some_hundred_thousand_tokens_beside_the_weights() -> None:
    assert 250_000 < RooflineDevice().num_kv_tokens < 420_000


def test_drafting_costs_about_a_millisecond_for_a_row_and_several_for_a_full_batch() -> None:
    """Published for another target on another device: 0.9 ms at 1 request, 5.4 ms at 256."""
    device = RooflineDevice()
    assert 0.5e-3 < device.draft_s(num_rows=1, longest=7, num_context_tokens=0) < 3e-3
    assert 4e-3 < device.draft_s(num_rows=256, longest=7, num_context_tokens=0) < 20e-3
    assert device.draft_s(num_rows=0, longest=0, num_context_tokens=0) == 0.0


def test_a_profiled_device_has_the_times_of_its_table() -> None:
    steps = (
        StepSample(128, 1, 1, 1.0),
        StepSample(128, 1, 4, 1.6),
        StepSample(128, 8, 8, 2.0),
        StepSample(128, 8, 32, 4.4),
    )
    drafts = DraftSample(1, 4, 0.5), DraftSample(8, 4, 1.2)
    device = ProfiledDevice(CostTable(steps, drafts))
    assert [device.step_s(work(1, per_row=n)) for n in (1, 2, 3)] == pytest.approx([1.0, 1.2, 1.4])
    assert device.step_s(work(8, per_row=4)) == pytest.approx(4.4)
    assert device.step_s(work(1, per_row=132)) == pytest.approx(14.4), "a prompt costs as many rows do"
    assert device.draft_s(num_rows=4, longest=4, num_context_tokens=9) == pytest.approx(0.8)
    assert device.step_s(work(0)) == 0.0


def test_noise_spreads_times_about_those_of_the_table() -> None:
    device = ProfiledDevice(CostTable((StepSample(0, 1, 1, 1.0),)), noise=0.1, seed=3)
    seconds = np.array([device.step_s(work(1)) for _ in range(2000)])
    assert np.log(seconds).mean() == pytest.approx(0.0, abs=0.01)
    assert np.log(seconds).std() == pytest.approx(0.1, rel=0.1)
