"""Products with weights that were packed once for the kernels."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from dspark_batch.models import huge_pages
from dspark_batch.models.kernels.library import Kernels

TILE_OUTPUTS = 32


class Epilogue(IntEnum):
    """What happens to a product before it is stored."""

    STORE = 0
    """Rounded to the model's dtype."""
    ADD = 1
    """Rounded, then added to what is there."""
    GATE = 2
    """silu(gate) * value of a fused gate and value product; half as wide."""
    FLOAT32 = 3
    """Stored in float32, unrounded."""


class PackedLinear:
    """``x @ weight.T + bias`` for x [M, in] and weight [out, in], both of one dtype, in % 16 == 0.

    A row of the result depends on that row of ``x`` alone, bit for bit: not on M, nor on the number of threads.
    ``gated``: the weight holds gates, then values, and calls give silu(gate) * value, [M, out / 2].
    """

    __slots__ = ("bias", "gated", "in_features", "is_bf16", "kernels", "out_features", "weight")

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> None:
        assert weight.shape[1] % 16 == 0, f"{weight.shape[1]} inputs: the kernels need a multiple of 16"
        self.kernels, self.gated, self.bias = kernels, gated, None
        self.out_features, self.in_features = weight.shape
        self.is_bf16 = int(weight.dtype == torch.bfloat16)
        order = torch.arange(self.out_features)
        if gated:
            assert self.out_features % TILE_OUTPUTS == 0, f"{self.out_features} gated outputs: need a multiple of 32"
            order = order.view(2, -1, TILE_OUTPUTS // 2).transpose(0, 1).flatten().contiguous()
        num_padded = -(-self.out_features // TILE_OUTPUTS) * TILE_OUTPUTS
        self.weight = huge_pages.zeros((num_padded * self.in_features,), dtype=weight.dtype)
        source = weight.contiguous()
        kernels.lib.ds_pack(
            self.is_bf16,
            source.data_ptr(),
            order.data_ptr(),
            self.out_features,
            self.in_features,
            self.weight.data_ptr(),
        )
        if bias is not None:
            self.bias = torch.nn.functional.pad(bias[order], (0, num_padded - self.out_features))

    def __call__(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """[M, in] -> [M, out] (half of it where gated). ``dtype=torch.float32``: unrounded sums of a bf16 product."""
        epilogue = Epilogue.GATE if self.gated else Epilogue.STORE
        if not self.gated and dtype == torch.float32:
            epilogue = Epilogue.FLOAT32
        width = self.out_features // 2 if self.gated else self.out_features
        out = torch.empty((x.shape[0], width), dtype=dtype or x.dtype)
        self._run(x, out, epilogue)
        return out

    def plain(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out] also where the product is gated: gates, then values."""
        out = torch.empty((x.shape[0], self.out_features), dtype=x.dtype)
        self._run(x.contiguous(), out, Epilogue.STORE)
        if not self.gated:
            return out
        return out.view(x.shape[0], -1, 2, TILE_OUTPUTS // 2).transpose(1, 2).reshape(x.shape[0], -1)

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """out += product, both rounded to the model's dtype first. out: [M, out]."""
        self._run(x, out, Epilogue.ADD)

    @property
    def arguments(self) -> tuple[int, int, int | None, int, int]:
        """What native calls on this product begin with: the dtype's flag, weight, bias, outputs and inputs."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return self.is_bf16, self.weight.data_ptr(), bias, self.out_features, self.in_features

    def _run(self, x: Tensor, out: Tensor, epilogue: Epilogue) -> None:
        self.kernels.lib.ds_linear(
            *self.arguments,
            x.data_ptr(),
            x.shape[0],
            out.data_ptr(),
            out.shape[1],
            epilogue,
        )
