"""The parallel part of DSpark: a few decoder layers over a block of slots that attend to context features.

Source: arXiv 2607.05147, section on the drafter, and DFlash (arXiv 2602.06036). Attention itself is handed in, so the
same layers serve inference over a cache and training over packed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_batch.drafters.dspark.config import DSparkConfig
from dspark_batch.drafters.dspark.target_parts import ElementOps, LinearOp, MakeLinear, TorchOps

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) of the blocks, rotated -> [T, Hq * D]. It adds the context."""


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: LinearOp
    qk_norm: Tensor
    output: LinearOp
    mlp_norm: Tensor
    gate_up: LinearOp
    down: LinearOp


class ContextLayers:
    """What makes keys and values of the target's features, for all draft layers. Holds no state of rows."""

    def __init__(
        self, config: DSparkConfig, weights: Mapping[str, Tensor], *, linear: MakeLinear, ops: ElementOps | None = None
    ) -> None:
        self.config = config
        widths = (config.hidden_size, config.head_dim, config.intermediate_size)
        self._ops = TorchOps() if ops is None or any(width % ops.lanes for width in widths) else ops
        self._fc = linear(weights["fc.weight"])
        self._hidden_norm = weights["hidden_norm.weight"]
        norms = [weights[f"layers.{i}.self_attn.k_norm.weight"] for i in range(config.num_layers)]
        self._k_norms = torch.stack(norms).unsqueeze(1)
        # All layers read the same features, so one product makes the context of all of them.
        names = [f"layers.{i}.self_attn.{x}_proj.weight" for i in range(config.num_layers) for x in "kv"]
        self._context_kv = linear(torch.cat([weights[name] for name in names]))
        self._ones = torch.ones_like(weights["layers.0.self_attn.k_norm.weight"])

    def context(self, features: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [L, M, Hkv, D] of M context positions.

        features: [M, len(taps) * H], the target's. cos, sin: [M, D/2] at the tokens' positions.
        """
        config = self.config
        x = self._ops.rms_norm(self._fc(features), self._hidden_norm, config.norm_eps)
        kv = self._context_kv(x).view(x.shape[0], config.num_layers, 2, config.num_kv_heads, config.head_dim)
        k = self._ops.rms_norm(kv[:, :, 0].contiguous(), self._ones, config.norm_eps) * self._k_norms
        k = rotate(k, cos[:, None, None], sin[:, None, None])
        return k.transpose(0, 1), kv[:, :, 1].transpose(0, 1)


class Backbone(ContextLayers):
    """The draft layers too, one operation after another. T counts flat slots (R rows of ``block_size`` each)."""

    def __init__(
        self, config: DSparkConfig, weights: Mapping[str, Tensor], *, linear: MakeLinear, ops: ElementOps | None = None
    ) -> None:
        super().__init__(config, weights, linear=linear, ops=ops)
        self._norm = weights["norm.weight"]
        self._layers = tuple(_layer(config, weights, f"layers.{i}.", linear) for i in range(config.num_layers))

    def blocks(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """[T, H] slot embeddings -> [T, H] final-norm output. cos, sin: [T, D/2] at the slots' positions."""
        config, eps, ops = self.config, self.config.norm_eps, self._ops
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        num_rotated = config.num_heads + config.num_kv_heads
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(ops.rms_norm(x, layer.input_norm, eps)).view(x.shape[0], -1, config.head_dim)
            normed = ops.rms_norm(qkv[:, :num_rotated].contiguous(), self._ones, eps) * layer.qk_norm
            qk = rotate(normed, cos, sin)
            attended = attend(index, qk[:, : config.num_heads], qk[:, config.num_heads :], qkv[:, num_rotated:])
            x = x + layer.output(attended)
            x = x + layer.down(ops.silu_mul(layer.gate_up(ops.rms_norm(x, layer.mlp_norm, eps))))
        return ops.rms_norm(x, self._norm, eps)


def backbone_shapes(config: DSparkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the backbone."""
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, len(config.taps) * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
    }
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (h,),
            f"{prefix}post_attention_layernorm.weight": (h,),
            f"{prefix}self_attn.q_proj.weight": (q, h),
            f"{prefix}self_attn.k_proj.weight": (kv, h),
            f"{prefix}self_attn.v_proj.weight": (kv, h),
            f"{prefix}self_attn.o_proj.weight": (h, q),
            f"{prefix}self_attn.q_norm.weight": (d,),
            f"{prefix}self_attn.k_norm.weight": (d,),
            f"{prefix}mlp.gate_proj.weight": (i, h),
            f"{prefix}mlp.up_proj.weight": (i, h),
            f"{prefix}mlp.down_proj.weight": (h, i),
        }
    return shapes


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., D]; pair i is dims i and i + D/2. cos, sin: broadcastable to [..., D/2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _layer(config: DSparkConfig, weights: Mapping[str, Tensor], prefix: str, linear: MakeLinear) -> _Layer:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    q_norm, k_norm = (weights[f"{attention}{x}_norm.weight"] for x in "qk")
    return _Layer(
        input_norm=weights[f"{prefix}input_layernorm.weight"],
        qkv=linear(torch.cat([weights[f"{attention}{x}_proj.weight"] for x in "qkv"])),
        # Of all rotated heads at once, [Hq + Hkv, D].
        qk_norm=torch.cat([q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)]),
        output=linear(weights[f"{attention}o_proj.weight"]),
        mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"],
        gate_up=linear(torch.cat([weights[f"{mlp}{x}_proj.weight"] for x in ("gate", "up")])),
        down=linear(weights[f"{mlp}down_proj.weight"]),
    )
