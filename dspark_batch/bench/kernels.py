"""Times the native kernels against torch and against the bytes that they must read."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from dspark_batch.bench.options import (
    AsJson,
    ContextTokens,
    Dtype,
    Repeats,
    Threads,
    engine_config,
    run_module,
    write_json,
)
from dspark_batch.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dspark_batch.models.kernels.library import Kernels

SHAPES = ((1, 1), (8, 1), (32, 1), (32, 4), (128, 1))
"""(rows, tokens per row) of a decode or verify step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Sizes of one decoder layer; the defaults are SmolLM2-135M's."""

    hidden: int = 576
    inner: int = 1536
    num_q_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    num_layers: int = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTiming:
    """Medians over all layers of a model. ``floor_ms``: the bytes read at ``stream_gb_per_s``."""

    op: str
    num_rows: int
    tokens_per_row: int
    native_ms: float
    torch_ms: float | None
    floor_ms: float


def time_kernels(
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    context: int = 200,
    repeats: int = 7,
    stream_gb_per_s: float = 20.0,
    shape: LayerShape | None = None,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
) -> list[KernelTiming]:
    """Interleaved medians of ``repeats`` runs on torch's threads; layers do not share memory."""
    shape = shape or LayerShape()
    timings = []
    for rows, tokens in shapes:
        timings += _products(kernels, shape, dtype, rows, tokens, repeats, stream_gb_per_s)
        timings.append(_attention(kernels, shape, dtype, rows, tokens, context, repeats, stream_gb_per_s))
    return timings


def format_timings(timings: list[KernelTiming]) -> str:
    """A plain table, one line per operation and shape."""
    lines = [f"{'op':<10} {'rows':>5} {'tokens':>6} {'native ms':>10} {'torch ms':>10} {'floor ms':>9}"]
    for t in timings:
        other = "-" if t.torch_ms is None else f"{t.torch_ms:.2f}"
        lines.append(
            f"{t.op:<10} {t.num_rows:>5} {t.tokens_per_row:>6} {t.native_ms:>10.2f} {other:>10} {t.floor_ms:>9.2f}"
        )
    return "\n".join(lines)


def _products(
    kernels: Kernels,
    shape: LayerShape,
    dtype: torch.dtype,
    rows: int,
    tokens: int,
    repeats: int,
    stream_gb_per_s: float,
) -> list[KernelTiming]:
    import torch

    from dspark_batch.models.kernels.packed import PackedLinear
    from dspark_batch.models.linear import Linear

    q, kv = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "qkv": (q + 2 * kv, shape.hidden),
        "output": (shape.hidden, q),
        "gate_up": (2 * shape.inner, shape.hidden),
        "down": (shape.hidden, shape.inner),
    }
    timings = []
    for name, (outputs, inputs) in sizes.items():
        weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(shape.num_layers)]
        native, plain = [PackedLinear(kernels, w) for w in weights], [Linear(w) for w in weights]
        x = torch.randn(rows * tokens, inputs, dtype=dtype)
        native_ms, torch_ms = _medians(partial(_call_all, native, x), partial(_call_all, plain, x), repeats)
        num_bytes = dtype.itemsize * outputs * inputs * shape.num_layers
        timings.append(
            KernelTiming(
                op=name,
                num_rows=rows,
                tokens_per_row=tokens,
                native_ms=native_ms,
                torch_ms=torch_ms,
                floor_ms=num_bytes / stream_gb_per_s / 1e6,
            )
        )
    return timings


def _attention(
    kernels: Kernels,
    shape: LayerShape,
    dtype: torch.dtype,
    rows: int,
    tokens: int,
    context: int,
    repeats: int,
    stream_gb_per_s: float,
) -> KernelTiming:
    import torch
    from torch.nn import functional

    from dspark_batch.models.kernels.library import AttentionPlan, AttentionShape, attend

    dim, q_heads, kv_heads, end = shape.head_dim, shape.num_q_heads, shape.num_kv_heads, context + tokens
    cache = torch.randn(2, shape.num_layers, kv_heads, rows * end, dim, dtype=dtype)
    k, v = cache
    qkv = torch.randn(rows * tokens, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    out = torch.empty(rows * tokens, q_heads * dim, dtype=dtype)
    cos = sin = torch.rand(end, dim // 2)
    heads = AttentionShape(num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, cache_tokens=rows * end)
    packed = torch.randn(rows, kv_heads, q_heads // kv_heads * tokens, dim, dtype=dtype)

    def native() -> None:
        plan = AttentionPlan(kernels, [(tokens, context, row * end, 0, 0) for row in range(rows)], heads)
        for layer in range(shape.num_layers):
            attend(kernels, plan, qkv, cos=cos, sin=sin, k=k[layer], v=v[layer], out=out)

    def plain() -> None:
        """Only the fused product, over rows of one length: the most that torch can do without copies."""
        for layer in range(shape.num_layers):
            keys, values = (x[layer].view(kv_heads, rows, end, dim).transpose(0, 1) for x in (k, v))
            functional.scaled_dot_product_attention(packed, keys, values)

    native_ms, torch_ms = _medians(native, plain, repeats)
    return KernelTiming(
        op="attention",
        num_rows=rows,
        tokens_per_row=tokens,
        native_ms=native_ms,
        torch_ms=torch_ms,
        floor_ms=cache.nbytes / stream_gb_per_s / 1e6,
    )


def _call_all(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    for function in functions:
        function(x)


def _medians(native: Callable[[], object], plain: Callable[[], object], repeats: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for function, found in zip((native, plain), times, strict=True):
            start = time.perf_counter()
            function()
            found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def command(
    context: ContextTokens = 200,
    repeats: Repeats = 7,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """The native kernels against torch, and against the bytes that they must read."""
    import torch

    from dspark_batch.models.kernels.library import DTYPES, load_kernels
    from dspark_batch.models.loader import resolve_dtype

    chosen = resolve_dtype(engine_config({"dtype": dtype}).dtype, torch.device("cpu"))
    if chosen not in DTYPES:
        raise ConfigError([Problem("model.dtype", f"the native kernels do not compute in {dtype}", "command line")])
    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("the native kernels cannot be had here; the log says why")
    torch.set_num_threads(threads or torch.get_num_threads())
    timings = time_kernels(kernels, dtype=chosen, context=context, repeats=repeats)
    sys.stdout.write(format_timings(timings) + "\n")
    if as_json:
        write_json([asdict(timing) for timing in timings])


if __name__ == "__main__":
    sys.exit(run_module(command))
