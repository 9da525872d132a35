from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dspark_batch.models.kernels.library import Kernels
from dspark_batch.models.kernels.packed import PackedLinear
from dspark_batch.models.ops import TorchOps

TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float32: 2e-5}
ROWS = (1, 7, 61)
SHAPES = [(33, 16), (96, 48), (100, 64), (64, 528), (7, 1536)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [16, 48, 576])
def test_norms_equal_the_plain_ones(kernels: Kernels, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = draw(rows, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    residual = draw(rows, width, dtype=dtype, seed=2)
    plain = TorchOps()
    close(kernels.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), dtype)
    want, want_sum = plain.add_rms_norm(x, residual, weight, 1e-5)
    got, got_sum = kernels.add_rms_norm(x, residual, weight, 1e-5)
    close(got, want, dtype)
    assert torch.equal(got_sum, want_sum)
    assert got_sum is residual


@pytest.mark.parametrize("rows", ROWS)
def test_the_gate_equals_the_plain_one_over_the_whole_range(kernels: Kernels, dtype: torch.dtype, rows: int) -> None:
    gate_up = draw(rows, 2 * 80, dtype=dtype) * torch.logspace(-3, 1.9, 160).to(dtype)
    want = TorchOps().silu_mul(gate_up)
    torch.testing.assert_close(kernels.silu_mul(gate_up), want, rtol=2 * TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("width", [5, 64, 1000, 4801])
def test_argmax_gives_the_first_maximum_and_the_distance_to_the_next(
    kernels: Kernels, dtype: torch.dtype, width: int
) -> None:
    logits = draw(13, width, dtype=dtype)
    logits[3] = 0.0
    logits[5] = float("-inf")
    logits[5, 2] = -7.0
    index, margin = kernels.argmax(logits)
    top = logits.float().topk(2, dim=-1).values
    assert index.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]
    assert torch.equal(margin, top[:, 0] - top[:, 1])


def test_argmax_of_a_row_with_a_nan_is_no_token(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = draw(3, 4801, dtype=dtype)
    logits[1, 4111] = float("nan")
    index, margin = kernels.argmax(logits)
    assert index[1] == -1
    assert margin[1].isnan()
    assert (index[[0, 2]] >= 0).all()


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_equal_dense_ones(
    kernels: Kernels, dtype: torch.dtype, outputs: int, inputs: int, bias: bool
) -> None:
    weight = draw(outputs, inputs, dtype=dtype)
    added = draw(outputs, dtype=dtype, seed=1) if bias else None
    packed = PackedLinear(kernels, weight, added)
    for rows in (1, 2, 7, 12, 13, 29, 211):
        x = draw(rows, inputs, dtype=dtype, seed=rows)
        want = functional.linear(x.double(), weight.double(), None if added is None else added.double())
        close(packed(x), want, dtype)
        close(packed(x, dtype=torch.float32), want, torch.float32)
        total = draw(rows, outputs, dtype=dtype, seed=3)
        expected = total + packed(x)
        packed.add_to(x, total)
        assert torch.equal(total, expected)


def test_a_gated_product_is_the_gate_of_the_dense_one(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = draw(2 * 80, 48, dtype=dtype), draw(13, 48, dtype=dtype, seed=1)
    packed = PackedLinear(kernels, weight, draw(2 * 80, dtype=dtype, seed=2), gated=True)
    plain = PackedLinear(kernels, weight, draw(2 * 80, dtype=dtype, seed=2))
    assert torch.equal(packed.plain(x), plain(x))
    assert torch.equal(packed(x), kernels.silu_mul(plain(x)))


@pytest.mark.parametrize("inputs", [64, 96, 208, 480])
def test_no_bit_of_a_product_depends_on_the_other_rows(kernels: Kernels, dtype: torch.dtype, inputs: int) -> None:
    packed = PackedLinear(kernels, draw(100, inputs, dtype=dtype))
    x = draw(61, inputs, dtype=dtype)
    whole = packed(x)
    for first, rows in ((0, 1), (1, 5), (6, 12), (18, 13), (31, 30), *((1, rows) for rows in range(2, 11))):
        assert torch.equal(packed(x[first : first + rows].contiguous()), whole[first : first + rows])
