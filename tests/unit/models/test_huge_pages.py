"""Large host tensors: as those of torch, but for the pages they lie on."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest
import torch

from dspark_batch.models import huge_pages

LARGE = (3, 1 << 20, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(5,), (2, 3), LARGE, (0, 4)])
def test_tensors_are_zero_and_can_be_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = huge_pages.zeros(shape, dtype=dtype)
    assert (made.shape, made.dtype, made.device.type) == (shape, dtype, "cpu")
    assert made.is_contiguous()
    assert not made.any()
    made += 3
    assert (made == 3).all()


@pytest.mark.parametrize("missing", ["the constant", "the kernel's support"])
def test_systems_without_huge_pages_get_plain_ones(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "the constant":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    made = huge_pages.zeros(LARGE, dtype=torch.float32)
    made[2, -1, 1] = 7
    assert made.sum() == 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory in KiB")
def test_memory_is_taken_when_it_is_written_and_given_back_with_the_tensor() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(40):
        made = huge_pages.zeros((64 << 20,), dtype=torch.float32)  # 256 MiB, most of it untouched
        made[: 8 << 20] = 1.0  # 32 MiB
        view = made[5:9]
        del made
        assert view.sum() == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10
