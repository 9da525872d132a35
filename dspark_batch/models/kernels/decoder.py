"""The whole decoder as one native call a step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_batch.models.kernels.library import AttentionPlan, AttentionShape, Kernels, NativeRow
from dspark_batch.models.kernels.packed import PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLayer:
    """One layer's weights. gate_up is ``gated``; q_norm, k_norm: [D] or None; window: positions seen, None for all."""

    input_norm: Tensor
    qkv: PackedLinear
    output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeShape:
    """Shape of a decoder. is_causal: as of ``AttentionShape``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    norm_eps: float
    is_causal: bool = True


class _LayerArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("qkv", "output", "gate_up", "down"),
                *("qkv_bias", "output_bias", "gate_up_bias", "down_bias"),
                *("input_norm", "mlp_norm", "q_norm", "k_norm", "k", "v"),
            )
        ),
        ("plan", ctypes.c_int64),
    )


class _ModelArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "cos", "sin", "final_norm")),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "inner", "q_width", "qkv_width")),
        ("eps", ctypes.c_float),
    )


class _StepArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plans", "x", "keep", "tap_column", "features", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_keep", "num_taps")),
    )


class NativeLayers:
    """All layers and the final norm over one KV cache.

    k, v: [L, Hkv, N, D]. cos, sin: [P, D/2] float32. The hidden states of a token depend on its row alone, bit for bit:
    not on the other rows of the step, on the slices that its row was cut into, nor on the number of threads.
    """

    def __init__(
        self,
        kernels: Kernels,
        shape: NativeShape,
        layers: Sequence[NativeLayer],
        *,
        final_norm: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        self._kernels = kernels
        self._is_bf16 = int(k.dtype == torch.bfloat16)
        self._attention = AttentionShape(
            num_q_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            cache_tokens=k.shape[2],
            norm_eps=shape.norm_eps,
            is_causal=shape.is_causal,
        )
        self._windows = list(dict.fromkeys(layer.window for layer in layers))
        self._kept_alive = (tuple(layers), final_norm, k, v, cos, sin)
        self._layer_args = (_LayerArgs * len(layers))(
            *(self._arguments(layer, k[i], v[i]) for i, layer in enumerate(layers))
        )
        self._model_args = _ModelArgs(
            layers=ctypes.addressof(self._layer_args),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            final_norm=final_norm.data_ptr(),
            num_layers=len(layers),
            hidden=shape.hidden_size,
            inner=layers[0].down.in_features,
            q_width=layers[0].output.in_features,
            qkv_width=layers[0].qkv.out_features,
            eps=shape.norm_eps,
        )

    def forward(
        self, x: Tensor, rows: Sequence[NativeRow], keep: Tensor, *, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the tokens ``keep``, and the tapped features.

        x: [T, H] embeddings, overwritten. rows: see ``NativeRow``. keep: [N] int64, increasing.
        taps: distinct layers whose outputs are wanted (-1: the embeddings). Returns [N, H], and [T, taps * H] or None.
        """
        plans = [AttentionPlan(self._kernels, rows, self._attention, window=window) for window in self._windows]
        handles = (ctypes.c_void_p * len(plans))(*(plan.handle for plan in plans))
        out = x.new_empty((keep.shape[0], x.shape[1]))
        features = x.new_empty((x.shape[0], len(taps) * x.shape[1])) if taps else None
        columns = (ctypes.c_int32 * (self._model_args.num_layers + 1))(*[-1] * (self._model_args.num_layers + 1))
        for column, tap in enumerate(taps):
            columns[tap + 1] = column
        step = _StepArgs(
            plans=ctypes.addressof(handles),
            x=x.data_ptr(),
            keep=keep.data_ptr(),
            tap_column=ctypes.addressof(columns),
            features=None if features is None else features.data_ptr(),
            out=out.data_ptr(),
            num_tokens=x.shape[0],
            num_keep=keep.shape[0],
            num_taps=len(taps),
        )
        self._kernels.lib.ds_step(self._is_bf16, ctypes.byref(self._model_args), ctypes.byref(step))
        return out, features

    def _arguments(self, layer: NativeLayer, k: Tensor, v: Tensor) -> _LayerArgs:
        products = {"qkv": layer.qkv, "output": layer.output, "gate_up": layer.gate_up, "down": layer.down}
        tensors: dict[str, Tensor | None] = {name: product.weight for name, product in products.items()}
        tensors |= {f"{name}_bias": product.bias for name, product in products.items()}
        tensors |= {"input_norm": layer.input_norm, "mlp_norm": layer.mlp_norm}
        tensors |= {"q_norm": layer.q_norm, "k_norm": layer.k_norm, "k": k, "v": v}
        pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
        return _LayerArgs(**pointers, plan=self._windows.index(layer.window))


def embed(table: Tensor, token_ids: Tensor) -> Tensor:
    """[V, H], [T] -> [T, H]"""
    return functional.embedding(token_ids, table)
