"""The small element-wise steps of a decoder layer, behind an interface that native code can take over."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Ops(Protocol):
    """Norm and activation over flat tokens. ``residual`` may be updated in place; inputs are dead afterwards."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., H], [H] -> [..., H]: normalise in float32, round to x's dtype, then scale."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """[T, H] -> (norm of residual + x, residual + x)."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] (gates, then values) -> [T, I]: silu(gate) * value."""
        ...


class TorchOps:
    """The plain implementation: right everywhere, and the oracle of native ones."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return self.rms_norm(residual, weight, eps), residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, value = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * value
