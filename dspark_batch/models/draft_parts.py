"""A loaded target's embedding, head and facts, for drafters that share them (``drafters.dspark.target_parts``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dspark_batch.models.draft_blocks import NativeBlocks, native_blocks
from dspark_batch.models.kernels.library import Kernels, load_kernels
from dspark_batch.models.kernels.packed import PackedLinear
from dspark_batch.models.linear import Linear
from dspark_batch.models.native import NativeDecoder
from dspark_batch.models.rope import rope_table
from dspark_batch.models.rope_spec import rope_spec
from dspark_batch.models.runner import TargetRunner
from dspark_batch.tensors import BlockWeights


class RunnerParts:
    """Fulfils ``drafters.dspark.target_parts.TargetParts`` for a :class:`TargetRunner`."""

    def __init__(self, target: TargetRunner, *, fingerprint: str) -> None:
        self._target = target
        self.fingerprint = fingerprint

    @property
    def vocab_size(self) -> int:
        return self._target.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._target.spec.hidden_size

    @property
    def num_layers(self) -> int:
        return self._target.spec.num_layers

    @property
    def max_context(self) -> int:
        return self._target.max_context

    @property
    def num_kv_tokens(self) -> int:
        return self._target.kv.num_total_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self._target.dtype

    @property
    def device(self) -> torch.device:
        return self._target.device

    @property
    def ops(self) -> Kernels | None:
        """The native kernels, where the target runs on them too."""
        return load_kernels() if isinstance(self._target.decoder, NativeDecoder) else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H]"""
        return self._target.decoder.embed(token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] float32"""
        return self._target.logits(hidden)

    def linear(self, weight: Tensor, *, float32: bool = False) -> Callable[[Tensor], Tensor]:
        """The product with ``weight`` [out, in]; on the native kernels where the target runs on them too."""
        kernels = self.ops
        if kernels is None or weight.shape[1] % kernels.lanes:
            dense = Linear(weight)
            return (lambda x: dense(x).float()) if float32 else dense
        packed = PackedLinear(kernels, weight)
        return (lambda x: packed(x.contiguous(), dtype=torch.float32)) if float32 else packed.plain

    def block_layers(self, weights: BlockWeights) -> NativeBlocks | None:
        """The draft layers as one native call; None where the target does not run on the kernels or a width is odd."""
        kernels = self.ops
        return native_blocks(kernels, weights) if kernels is not None else None

    def rope_table(
        self, fields: Mapping[str, object], *, head_dim: int, num_positions: int, where: str
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, [num_positions, D/2] each.

        Raises:
            ModelError: the fields are missing or senseless.
            UnsupportedModelError: an unknown kind of position embedding.
        """
        spec, _ = rope_spec(fields, where=where)
        table = rope_table(spec, head_dim=head_dim, num_positions=num_positions, dtype=self.dtype, device=self.device)
        return table.cos, table.sin
