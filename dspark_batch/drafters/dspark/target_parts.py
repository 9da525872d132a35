"""What a DSpark drafter shares with its target. The engine hands it in, so that drafters know no model code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.tensors import BlockWeights

LinearOp = Callable[[Tensor], Tensor]
"""[T, in] -> [T, out]"""


class MakeLinear(Protocol):
    """From a weight [out, in], on the device and in the dtype, to its product.

    ``float32``: the product is wanted in float32, unrounded where the device can.
    """

    def __call__(self, weight: Tensor, *, float32: bool = False) -> LinearOp: ...


class ElementOps(Protocol):
    """What lies between products, on contiguous tensors."""

    @property
    def lanes(self) -> int:
        """Every width is a multiple of it."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., D], [D] -> [..., D]: normalise in float32, round to x's dtype, then scale."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] (gates, then values) -> [T, I]"""
        ...


class TorchOps:
    """:class:`ElementOps` on any device, with gradients."""

    lanes: Final = 1

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, value = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * value


class RunBlocks(Protocol):
    """The draft layers over a context cache in one call. A block's slots see each other and their row's context."""

    def __call__(
        self, x: Tensor, blocks: Sequence[tuple[int, int]], *, size: int, first: int, k: Tensor, v: Tensor
    ) -> Tensor:
        """[R * size, H] slot embeddings, overwritten -> [R * (size - first), H] of the slots from ``first`` on, normed.

        blocks: of every row the first token of its context in the cache, and how long the context is; the block's keys
        and values are written behind it. k, v: [L, Hkv, N, D].
        """
        ...


class TargetParts(Protocol):
    """The frozen embedding and head of the target, and its facts. ``models.draft_parts`` has the real one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the target's KV pool holds in all: no more can be in flight, shared prefixes apart."""
        ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def ops(self) -> ElementOps | None:
        """Faster ones than torch's, of rows of a multiple of 16 elements; None where there are none."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H] in the target's dtype."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32: the target's head without its final norm."""
        ...

    def linear(self, weight: Tensor, *, float32: bool = False) -> LinearOp:
        """As :class:`MakeLinear`, in the layout that the device multiplies fastest."""
        ...

    def block_layers(self, weights: BlockWeights) -> RunBlocks | None:
        """The draft layers as one call; None where the device has none."""
        ...

    def rope_table(
        self, fields: Mapping[str, object], *, head_dim: int, num_positions: int, where: str
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, [num_positions, D/2] each, of a checkpoint's position embeddings.

        Raises:
            ModelError: the fields are missing, senseless or of an unknown kind.
        """
        ...


def head_rows(parts: TargetParts, token_ids: Tensor) -> Tensor:
    """Rows [len(token_ids), H] of the target's head, in its dtype.

    Read through the head itself: its product with a unit vector is one column of its weight, exactly, whatever layout
    the head is kept in.
    """
    columns = []
    for start in range(0, parts.hidden_size, _UNITS_AT_ONCE):
        width = min(_UNITS_AT_ONCE, parts.hidden_size - start)
        units = torch.zeros(width, parts.hidden_size, dtype=parts.dtype, device=parts.device)
        units[:, start : start + width].fill_diagonal_(1.0)
        columns.append(parts.logits(units)[:, token_ids].T.to(parts.dtype))
    return torch.cat(columns, dim=1).contiguous()


_UNITS_AT_ONCE = 64
