"""The backbone on native operations, and the writes of a few rows, against torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.drafters.dspark.backbone import Backbone
from dspark_batch.drafters.dspark.context_cache import SpanWriter
from dspark_batch.drafters.dspark.target_parts import ElementOps, LinearOp
from dspark_batch.models.kernels.library import load_kernels
from dspark_batch.testing.tiny_drafter import random_drafter, tiny_drafter_config


def dense(weight: Tensor, *, float32: bool = False) -> LinearOp:
    return lambda x: functional.linear(x, weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_native_operations_give_what_torch_gives(num_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no compiler")
    config = tiny_drafter_config(hidden_size=64, intermediate_size=96, head_dim=16)
    weights = {name: tensor.to(dtype) for name, tensor in random_drafter(config).tensors.items()}
    torch.manual_seed(num_rows)
    num_slots = num_rows * config.block_size
    x, features = torch.randn(num_slots, 64).to(dtype), torch.randn(7, 2 * 64).to(dtype)
    angles = torch.rand(num_slots, 8)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * (k + v).repeat_interleave(3, dim=1)).flatten(1)

    def run(ops: ElementOps | None) -> list[Tensor]:
        backbone = Backbone(config, weights, linear=dense, ops=ops)
        return [*backbone.context(features, cos[:1], sin[:1]), backbone.blocks(x.clone(), cos, sin, attend)]

    for got, want in zip(run(kernels), run(None), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_spans_are_written_as_an_indexed_copy_writes_them() -> None:
    spans = [(3, 2), (11, 1), (0, 3)]
    new = torch.randn(2, 4, 6, 5)
    pool, expected = torch.zeros(2, 2, 4, 16, 5)
    writer = SpanWriter(spans, pool.device)
    writer.write(pool, new[..., :4, :])
    writer.write(pool, new[..., 4:, :], at=4)
    places = [first + i for first, count in spans for i in range(count)]
    expected.index_copy_(2, torch.tensor(places), new)
    assert torch.equal(pool, expected)
