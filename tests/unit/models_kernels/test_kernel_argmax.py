"""The arg-max that makes few outputs, against the outputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspark_batch.models.kernels.argmax import ProductArgmax
from dspark_batch.models.kernels.library import Kernels
from dspark_batch.models.kernels.packed import PackedLinear
from dspark_batch.models.native import NativeDraws
from dspark_batch.sampling.sampler import GreedyDraws

SHAPES = [(5, 16), (64, 32), (97, 576), (1057, 48), (4001, 64)]


def same(found: Tensor, want: Tensor) -> bool:
    """Also where both are NaN."""
    return torch.equal(found.nan_to_num(-1.0), want.nan_to_num(-1.0))


def check(head: PackedLinear, hidden: Tensor) -> ProductArgmax:
    logits = head(hidden, dtype=torch.float32)
    want, _ = head.kernels.argmax(logits)
    for screens in (True, False):
        argmax = ProductArgmax(head, screens=screens)
        index, best = argmax(hidden)
        assert torch.equal(index, want)
        assert same(best, torch.where(logits.isnan().any(-1), torch.nan, logits.amax(-1)))
        if screens:
            screened = argmax
    draws = GreedyDraws(*NativeDraws(head).greedy(hidden))
    assert draws.draw() == want.clamp(min=0).tolist()
    assert draws.finite() == logits.amax(-1).isfinite().tolist()
    return screened


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_it_is_that_of_the_stored_outputs(
    kernels: Kernels, dtype: torch.dtype, outputs: int, inputs: int, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    weight[outputs // 2] = weight[1]  # a tie in every row
    for bias in (None, torch.randn(outputs, generator=generator).to(dtype)):
        head = PackedLinear(kernels, weight, bias)
        for num in (1, 2, 3, 5, 7, 101, 300):
            hidden = torch.randn(num, inputs, generator=generator).to(dtype)
            hidden[num // 2] = hidden[0] * torch.nan
            screened = check(head, hidden)
        assert screened.screens == (bias is None and bool(kernels.lib.ds_can_screen()))


def test_outputs_closer_than_integers_tell_apart_are_made(kernels: Kernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 64, generator=generator)
    weight = (base + 2e-3 * torch.randn(2000, 64, generator=generator)).to(dtype)
    hidden = torch.cat((base, base + 0.1 * torch.randn(40, 64, generator=generator))).to(dtype)
    check(PackedLinear(kernels, weight), hidden)


def test_what_integers_leave_out_of_a_row_decides_where_weights_are_integers(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    hidden = torch.full((1, 64), 0.49 / 32767)  # half of what rounds to one
    hidden[0, :2] = torch.tensor([1.0, 1 / 32767])
    weight = torch.zeros(500, 64)
    weight[:, 0] = 127
    weight[7, 1] = 1  # the largest by integers alone
    weight[400, 2:] = 127
    check(PackedLinear(kernels, weight.to(dtype)), hidden.to(dtype))


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e6])
def test_rows_and_weights_with_outliers(kernels: Kernels, dtype: torch.dtype, outlier: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, hidden = torch.randn(900, 96, generator=generator), torch.randn(33, 96, generator=generator)
    hidden[::2, 5] *= outlier
    weight[::7, 11] *= outlier
    check(PackedLinear(kernels, weight.to(dtype)), hidden.to(dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-18, 1e-9, 1e18, 1e30, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["a row", "a weight", "all weights"])
def test_numbers_at_the_ends_of_the_range(kernels: Kernels, dtype: torch.dtype, scale: float, part: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, hidden = torch.randn(130, 64, generator=generator), torch.randn(5, 64, generator=generator)
    if part == "a row":
        hidden[2] *= scale
    elif part == "a weight":
        weight[100] *= scale
    else:
        weight *= scale
    check(PackedLinear(kernels, weight.to(dtype)), hidden.to(dtype))


def test_most_outputs_of_a_peaked_row_are_never_made(kernels: Kernels, dtype: torch.dtype) -> None:
    """Outputs that cannot be the largest may hold anything: here, what the packed weights no longer say."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(4096, 64, generator=generator)
    weight[1000] *= 3
    hidden = weight[1000:1001].repeat(9, 1) + 0.1 * torch.randn(9, 64, generator=generator)
    head = PackedLinear(kernels, weight.to(dtype))
    argmax = ProductArgmax(head)
    if not argmax.screens:
        pytest.skip("this build makes all outputs")
    made = head.weight.view(-1, 32 * 64)[1000 // 32].clone()
    head.weight.fill_(torch.nan)
    head.weight.view(-1, 32 * 64)[1000 // 32] = made
    index, best = argmax(hidden.to(dtype))
    assert index.tolist() == [1000] * 9
    assert best.isfinite().all()
