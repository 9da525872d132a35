"""Matrix products of the decoder, with the layout that the device multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class Linear:
    """``x @ weight.T + bias`` for x [T, in] and weight [out, in].

    On CPUs, float32 and bfloat16 weights are re-ordered once into oneDNN's blocked layout: a plain product slows down
    tenfold in float32 between 2 and 64 rows, and by half in bfloat16 (docs/benchmarks).
    """

    __slots__ = ("_bias", "_packed", "_weight", "in_features", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._packed = _can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        if not self._packed:
            return functional.linear(x, self._weight, self._bias)
        if x.shape[0] == 0:
            return x.new_empty((0, self.out_features))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
