"""Matrix products of the decoder, with the layout that the device multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.kernels.library import Kernels
from dspark_batch.models.kernels.packed import PackedLinear


class Linear:
    """``x @ weight.T + bias`` for x [T, in] and weight [out, in].

    Holds its weight once, in one of three layouts: dense; oneDNN's blocks from the first call on a CPU (a plain product
    slows down tenfold in float32 between 2 and 64 rows, and by half in bfloat16); or that of the native kernels, once
    ``native`` was called. It can be called in all three.
    """

    __slots__ = ("_bias", "_blocked", "_dense", "_native", "in_features", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._dense: Tensor | None = weight
        self._blocked: Tensor | None = None
        self._native: PackedLinear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        if self._native is not None:
            return self._native.plain(x)
        if self._dense is not None and _has_blocks(self._dense):
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self._dense.contiguous(), None)
            self._dense = None
        if self._blocked is None:
            assert self._dense is not None
            return functional.linear(x, self._dense, self._bias)
        if x.shape[0] == 0:
            return x.new_empty((0, self.out_features))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, self._bias, "none", [], "")
        return out

    def native(self, kernels: Kernels, *, gated: bool = False) -> PackedLinear:
        """The product in the kernels' layout, which replaces the one held so far."""
        if self._native is None or self._native.gated != gated:
            assert self._native is None, "a product cannot be packed both ways"
            weight = self._dense if self._blocked is None else self._blocked.to_dense()
            assert weight is not None
            self._native = PackedLinear(kernels, weight, self._bias, gated=gated)
            self._dense = self._blocked = None
        return self._native


def _has_blocks(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
