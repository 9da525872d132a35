"""Attention backends. Importing this package loads none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_batch.models.attention.base import AttentionBackend, AttentionContext

BACKENDS = ("reference", "cpu", "native", "cuda")


def select_backend(context: AttentionContext, *, name: str | None = None) -> AttentionBackend[Any]:
    """Build the backend ``name``, or the fastest one for the cache's device and dtype.

    Raises:
        ValueError: no backend of that name.
    """
    name = name or context.kv.k.device.type
    if name == "cpu":
        from dspark_batch.models.attention.cpu import CpuAttention

        return CpuAttention(context)
    if name == "native":
        from dspark_batch.models.attention.native import NativeAttention
        from dspark_batch.models.kernels.library import load_kernels

        kernels = load_kernels()
        if kernels is None:
            raise ValueError("the native attention backend needs the compiled kernels, which cannot be had here")
        return NativeAttention(context, kernels)
    if name == "cuda":
        from dspark_batch.models.attention.cuda import CudaAttention

        return CudaAttention(context)
    if name == "reference":
        from dspark_batch.models.attention.reference import ReferenceAttention

        return ReferenceAttention(context)
    raise ValueError(f"unknown attention backend {name!r}; known are {', '.join(BACKENDS)}")
