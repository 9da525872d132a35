import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_batch.sampling import reference
from dspark_batch.sampling.noise import MAX_GUMBEL, argmax_with_noise, gumbel, noise_bits, noise_key, uniform

int64 = st.integers(-(2**63), 2**63 - 1)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The statistic in standard deviations above its mean."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(observed) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def numpy_bits(key: int, position: int, token_ids: np.ndarray) -> np.ndarray:
    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        start = mix(np.array([key], dtype=np.int64).astype(np.uint64))
        state = mix(start + np.uint64(position) * np.uint64(0xD1342543DE82EF95))
        return mix(state + token_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(12)


@given(key=int64, position=st.integers(0, 2**31), tokens=st.lists(st.integers(0, 2**18), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_bits_are_the_same_in_torch_numpy_and_python_integers(key: int, position: int, tokens: list[int]) -> None:
    keys, positions, ids = torch.tensor([key]), torch.tensor([position]), torch.tensor(tokens)
    bits = noise_bits(keys, positions, ids)
    assert bits.shape == (1, len(tokens))
    assert bits[0].tolist() == numpy_bits(key, position, np.array(tokens)).tolist()
    drawn = gumbel(keys, positions, ids)[0].tolist()
    assert drawn == pytest.approx([reference.gumbel(key, position, t) for t in tokens], abs=1e-12)


def test_known_values_stay_what_they_are_across_versions() -> None:
    assert noise_key(7, "row-1", 0) == 8623224550520749217
    assert noise_bits(torch.tensor([1]), torch.tensor([2]), torch.tensor([3])).item() == 2647437787354898


def test_keys_differ_by_seed_request_sample_and_stream() -> None:
    keys = {
        noise_key(seed, request, sample, stream=stream)
        for seed in (0, -1, 2**63 - 1)
        for request in ("", "a", "b", "\ud800", "a0")
        for sample in (0, 1)
        for stream in ("draw", "draft")
    }
    assert len(keys) == 3 * 5 * 2 * 2
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_uniform_never_reaches_its_ends_and_gumbel_stays_in_its_bounds() -> None:
    extremes = torch.tensor([0, 2**52 - 1])
    u = (extremes.double() + 0.5) * 2.0**-52
    assert u[0] > 0
    assert u[1] < 1
    assert float(-(-u[1].log()).log()) <= MAX_GUMBEL
    drawn = gumbel(torch.arange(50), torch.arange(50), torch.arange(1000))
    assert bool(drawn.isfinite().all())


def test_uniform_passes_a_chi_square_test_on_high_and_low_bits() -> None:
    u = uniform(torch.arange(40), torch.arange(40), torch.arange(5000)).flatten()
    for scale in (1.0, 2.0**20):
        counts = torch.histc((u * scale).frac(), bins=64, min=0, max=1).numpy()
        assert abs(chi_square(counts, np.full(64, len(u) / 64))) < 4.5


@pytest.mark.parametrize("axis", ["key", "position", "token"])
def test_neighbours_along_each_coordinate_are_independent(axis: str) -> None:
    base = torch.arange(60_000)
    zeros, ones = torch.zeros_like(base), torch.ones_like(base)

    def at(shift: int) -> torch.Tensor:
        coordinates = {"key": zeros, "position": ones, "token": ones} | {axis: base + shift}
        return uniform(coordinates["key"], coordinates["position"], coordinates["token"].unsqueeze(-1)).squeeze(-1)

    first, second = at(0), at(1)
    cells = (first * 8).long() * 8 + (second * 8).long()
    counts = torch.bincount(cells, minlength=64).numpy()
    assert abs(chi_square(counts, np.full(64, len(base) / 64))) < 4.5


def test_draws_over_a_whole_vocabulary_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -3.0])
    num = 60_000
    scores = logits.expand(num, -1).contiguous()
    keys, positions = torch.arange(num) // 300, torch.arange(num) % 300
    drawn = argmax_with_noise(scores, keys, positions, best=torch.zeros(num, dtype=torch.int64))
    counts = torch.bincount(drawn, minlength=6).numpy()
    expected = (logits.double().softmax(-1) * num).numpy()
    assert abs(chi_square(counts, expected)) < 4.5


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 7), (13, 101), (3, 70_001)])
def test_the_pruned_argmax_equals_the_full_evaluation(spread: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(hash((spread, shape)) % 1000)
    scores = torch.randn(shape, generator=generator) * spread
    keys = torch.randint(-(2**62), 2**62, (shape[0],), generator=generator)
    positions = torch.randint(0, 5000, (shape[0],), generator=generator)
    full = (scores.double() + gumbel(keys, positions, torch.arange(shape[1]))).argmax(-1)
    assert argmax_with_noise(scores, keys, positions, best=scores.argmax(-1)).tolist() == full.tolist()
