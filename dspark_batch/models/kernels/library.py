"""The compiled kernels as Python calls on torch tensors. Every call checks nothing: callers own shapes and dtypes."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from dspark_batch.models.kernels.build import SWITCH_VARIABLE, BuildError, build, open_library

logger = logging.getLogger(__name__)

ABI = 6
DTYPES = (torch.bfloat16, torch.float32)
KERNEL_LANES = 16
"""Widths are multiples of it."""

MAX_HEAD_DIM = 256
FALLBACK_COST = "slower, and in low precision near ties between tokens may fall by the batch"

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ds_abi": (_I, ()),
    "ds_has_bf16_dot": (_I, ()),
    "ds_num_threads": (_I, ()),
    "ds_plan_new": (_P, (_P, _P, _I)),
    "ds_plan_free": (None, (_P,)),
    "ds_attend": (None, (_I, _P, _P, _P, _P, _P, _P, _P, _P, _P)),
    "ds_rms_norm": (None, (_I, _P, _P, _P, _L, _L, _F)),
    "ds_add_rms_norm": (None, (_I, _P, _P, _P, _P, _L, _L, _F)),
    "ds_silu_mul": (None, (_I, _P, _P, _L, _L)),
    "ds_argmax": (None, (_I, _P, _L, _L, _P, _P)),
    "ds_can_screen": (_I, ()),
    "ds_screen": (None, (_I, _P, _L, _L, _P)),
    "ds_product_argmax": (None, (_I, _P, _P, _L, _L, _P, _P, _L, _P, _P)),
    "ds_draw": (None, (_P, _L, _P, _P, _L, _P)),
    "ds_pack": (None, (_I, _P, _P, _L, _L, _P)),
    "ds_step": (None, (_I, _P, _P)),
    "ds_linear": (None, (_I, _P, _P, _L, _L, _P, _L, _P, _L, _I)),
    "ds_suffix_extend": (None, (_P, _P, _P, _P, _L)),
    "ds_suffix_clear": (None, (_P, _L)),
    "ds_suffix_choose": (None, (_P, _P, _P, _P, _P, _L, _L, _P, _P, _P)),
}


class _Shape(ctypes.Structure):
    _fields_ = (
        ("num_q_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("cache_tokens", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("is_causal", ctypes.c_int32),
    )


class Kernels:
    """One loaded library. Tensors must be contiguous, on the CPU and of one dtype of ``DTYPES`` (see ``supports``)."""

    lanes: Final = KERNEL_LANES

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lib = open_library(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.lib, name, None)
            if function is None:
                raise BuildError(f"{path} lacks {name}; delete it to compile it again")
            function.restype, function.argtypes = result, arguments
        if self.lib.ds_abi() != ABI:
            raise BuildError(f"{path} speaks ABI {self.lib.ds_abi()}, wanted {ABI}; delete it to compile it again")

    @property
    def has_bf16_dot(self) -> bool:
        """Whether bfloat16 products run on the CPU's own dot instruction."""
        return bool(self.lib.ds_has_bf16_dot())

    @property
    def num_threads(self) -> int:
        """Threads of the OpenMP runtime, which is torch's."""
        return int(self.lib.ds_num_threads())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., H], [H] -> [..., H]: normalise in float32, round to x's dtype, then scale."""
        out, width = torch.empty_like(x), x.shape[-1]
        self.lib.ds_rms_norm(_typed(x), x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """[T, H] -> (norm of residual + x, residual + x); ``residual`` is updated in place and returned."""
        out, width = torch.empty_like(x), x.shape[-1]
        self.lib.ds_add_rms_norm(
            _typed(x),
            residual.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            eps,
        )
        return out, residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] (gates, then values) -> [T, I]: silu(gate) * value, rounded where a model of this dtype rounds."""
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self.lib.ds_silu_mul(_typed(gate_up), gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
        return out

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[N, V] -> (index [N] int64, margin [N] float32).

        Index: the first largest entry of each row, -1 where a row holds a NaN. Margin: its distance to the second.
        """
        rows, width = logits.shape
        index = torch.empty(rows, dtype=torch.int64)
        margin = torch.empty(rows, dtype=torch.float32)
        self.lib.ds_argmax(_typed(logits), logits.data_ptr(), rows, width, index.data_ptr(), margin.data_ptr())
        return index, margin

    def draw(self, logits: Tensor, *, flat: Tensor, integers: Tensor, reals: Tensor) -> Tensor:
        """Draws with keyed noise, as ``tensors.FastDraws`` says."""
        params = torch.cat((reals.view(torch.int64), integers), dim=1)
        tokens = torch.empty_like(flat)
        self.lib.ds_draw(
            logits.data_ptr(), logits.shape[1], params.data_ptr(), flat.data_ptr(), len(flat), tokens.data_ptr()
        )
        return tokens


NativeRow: TypeAlias = tuple[int, int, int, int, int]
"""(num_tokens, kv_len, own_start, prefix_start, prefix_len): position p of a row is at token ``prefix_start + p`` of
the cache below ``prefix_len``, at ``own_start + p - prefix_len`` from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Heads of a layer, and the tokens of its cache. norm_eps: of the head norms.

    is_causal: else the tokens of a slice see all of each other, besides what is in the cache.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    cache_tokens: int
    norm_eps: float = 1e-6
    is_causal: bool = True


class AttentionPlan:
    """The rows of one step, in flat order, for every layer with the same window. Owns its memory, freed with it.

    ``window``: a token sees that many positions, its own included; None for all. Scores are divided by the square root
    of the head's width.
    """

    __slots__ = ("_free", "handle", "num_tokens")

    def __init__(
        self,
        kernels: Kernels,
        rows: Sequence[NativeRow],
        shape: AttentionShape,
        *,
        window: int | None = None,
    ) -> None:
        assert shape.is_causal or window is None, "a window goes with causal attention only"
        native = _Shape(
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            window=window or 0,
            cache_tokens=shape.cache_tokens,
            scale=shape.head_dim**-0.5,
            norm_eps=shape.norm_eps,
            is_causal=shape.is_causal,
        )
        flat = [value for row in rows for value in (0, *row)]
        array = (ctypes.c_int32 * len(flat))(*flat)
        self._free = kernels.lib.ds_plan_free
        self.handle: int | None = kernels.lib.ds_plan_new(ctypes.byref(native), array, len(rows))
        if self.handle is None:
            raise MemoryError(f"no memory for the attention plan of {len(rows)} rows")
        self.num_tokens = sum(row[0] for row in rows)

    def __del__(self) -> None:
        handle, self.handle = getattr(self, "handle", None), None
        if handle is not None:
            self._free(handle)


def attend(
    kernels: Kernels,
    plan: AttentionPlan,
    qkv: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> None:
    """Norm and rotate, write keys and values, attend.

    qkv: [T, (Hq + 2 Hkv) * D], overwritten. cos, sin: [P, D/2] float32. k, v: one layer of the cache, [Hkv, N, D].
    out: [T, Hq * D]. A token's output depends on the token and on its row's keys and values alone, bit for bit:
    not on the other rows, on how the row's tokens are cut into slices, on sharing, nor on the number of threads.
    """
    kernels.lib.ds_attend(
        _typed(qkv),
        plan.handle,
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
    )


def why_unsupported(*, dtype: torch.dtype, device: torch.device, widths: Sequence[int], head_dim: int) -> str | None:
    """Why the kernels cannot run a model of this dtype, device and row widths; None where they can."""
    if device.type != "cpu":
        return f"they run on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"they compute in bfloat16 or float32, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM:
        return f"its head width {head_dim} is above {MAX_HEAD_DIM}"
    uneven = [width for width in (head_dim, *widths) if width % KERNEL_LANES]
    return f"its width {uneven[0]} is no multiple of {KERNEL_LANES}" if uneven else None


@cache
def load_kernels() -> Kernels | None:
    """The kernels of this process, compiled if need be; None where they are switched off or cannot be had."""
    if os.environ.get(SWITCH_VARIABLE, "").lower() in ("off", "0", "no"):
        return None
    try:
        return Kernels(build())
    except BuildError as error:
        logger.warning("native kernels are off, torch and numpy do their work (%s): %s", FALLBACK_COST, error)
        return None


def _typed(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)
