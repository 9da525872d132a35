"""The layers of a block drafter on the native CPU kernels: one call a round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_batch.models.kernels.decoder import NativeLayer, NativeLayers, NativeShape
from dspark_batch.models.kernels.library import Kernels, why_unsupported
from dspark_batch.models.kernels.packed import PackedLinear
from dspark_batch.tensors import BlockWeights


class NativeBlocks:
    """Fulfils ``drafters.dspark.target_parts.RunBlocks``: a decoder whose slices see all of themselves."""

    def __init__(self, kernels: Kernels, weights: BlockWeights) -> None:
        self._kernels, self._norm = kernels, weights.tensors["norm.weight"]
        self._layers = [_layer(kernels, weights, f"layers.{i}.") for i in range(weights.num_layers)]
        self._shape = NativeShape(
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            hidden_size=self._norm.shape[0],
            norm_eps=weights.norm_eps,
            is_causal=False,
        )
        self._cos, self._sin = weights.cos.float().contiguous(), weights.sin.float().contiguous()
        self._bound: tuple[Tensor, Tensor, NativeLayers] | None = None

    def __call__(
        self, x: Tensor, blocks: Sequence[tuple[int, int]], *, size: int, first: int, k: Tensor, v: Tensor
    ) -> Tensor:
        """[R * size, H], overwritten -> [R * (size - first), H]; see ``RunBlocks``."""
        if self._bound is None or self._bound[0] is not k or self._bound[1] is not v:
            self._bound = (k, v, self._over(k, v))
        slots = torch.arange(len(blocks) * size).view(-1, size)[:, first:].flatten()
        hidden, _ = self._bound[2].forward(x, [(size, length, start, 0, 0) for start, length in blocks], slots)
        return hidden

    def _over(self, k: Tensor, v: Tensor) -> NativeLayers:
        return NativeLayers(
            self._kernels, self._shape, self._layers, final_norm=self._norm, k=k, v=v, cos=self._cos, sin=self._sin
        )


def native_blocks(kernels: Kernels, weights: BlockWeights) -> NativeBlocks | None:
    """None where the kernels do not know the dtype or a width."""
    norm, gate = weights.tensors["norm.weight"], weights.tensors["layers.0.mlp.gate_proj.weight"]
    widths = (*gate.shape, weights.num_heads * weights.head_dim)
    if why_unsupported(dtype=norm.dtype, device=norm.device, widths=widths, head_dim=weights.head_dim):
        return None
    return NativeBlocks(kernels, weights)


def _layer(kernels: Kernels, weights: BlockWeights, prefix: str) -> NativeLayer:
    def tensor(name: str) -> Tensor:
        return weights.tensors[f"{prefix}{name}.weight"].contiguous()

    def product(*names: str, gated: bool = False) -> PackedLinear:
        return PackedLinear(kernels, torch.cat([tensor(name) for name in names]), gated=gated)

    return NativeLayer(
        input_norm=tensor("input_layernorm"),
        qkv=product("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=product("self_attn.o_proj"),
        mlp_norm=tensor("post_attention_layernorm"),
        gate_up=product("mlp.gate_proj", "mlp.up_proj", gated=True),
        down=product("mlp.down_proj"),
        q_norm=tensor("self_attn.q_norm"),
        k_norm=tensor("self_attn.k_norm"),
    )
