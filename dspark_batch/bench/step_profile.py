"""Where a plain decoding step's time goes, beside the least that its matrix products and KV reads could take.

floor = all weights, head included, multiplied in a loop of products alone at the same number of rows, by the faster of
the two products there are, plus the bytes of the live keys and values at the bandwidth of a copy. A greedy step makes
few of the logits (``bench.head``), so it may take less, and what is in neither products nor attention is a lower bound.

On one thread the clock is the CPU time of that thread, so that other load on the machine hardly shows. On several it is
the wall clock, and the machine must be idle: a loop of single products waits for every thread after each of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Concurrency,
    ContextTokens,
    Target,
    Threads,
    run_module,
    write_json,
)
from dspark_batch.core import Request, SamplingParams

if TYPE_CHECKING:
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.models.loader import LoadedTarget
    from dspark_batch.models.runner import TargetRunner

COPY_BYTES = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Medians, in milliseconds.

    products: our products alone; attention: attention, rotation and cache writes alone. forward, sample, host: the
    step, divided as the engine's own records divide it. other_share: what is in neither products nor attention.
    floor_share: floor / step.
    """

    num_rows: int
    context_tokens: int
    step_ms: float
    forward_ms: float
    sample_ms: float
    host_ms: float
    products_ms: float
    attention_ms: float
    onednn_ms: float
    kv_copy_ms: float
    floor_ms: float
    floor_share: float
    other_share: float


def profile_steps(
    loaded: LoadedTarget, *, rows: Sequence[int], context_tokens: int = 200, num_steps: int = 30
) -> list[StepProfile]:
    """Steps of a real engine, and its parts alone, in turn. Needs the native kernels."""
    return [_profile(loaded, num_rows=n, context_tokens=context_tokens, num_steps=num_steps) for n in rows]


def format_profiles(profiles: Sequence[StepProfile]) -> str:
    lines = ["rows  step  forward  sample  host | products  attention  oneDNN  KV copy | floor  floor/step  other"]
    lines += [
        f"{p.num_rows:4d} {p.step_ms:6.2f} {p.forward_ms:7.2f} {p.sample_ms:7.2f} {p.host_ms:6.2f} |"
        f" {p.products_ms:7.2f} {p.attention_ms:9.2f} {p.onednn_ms:9.2f} {p.kv_copy_ms:8.2f} |"
        f" {p.floor_ms:6.2f} {p.floor_share:8.0%} {p.other_share:8.0%}"
        for p in profiles
    ]
    return "\n".join(lines)


def _profile(loaded: LoadedTarget, *, num_rows: int, context_tokens: int, num_steps: int) -> StepProfile:
    import torch

    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.engine.engine import BatchEngine

    target = loaded.target
    products, onednn = _products(target, num_rows)
    attention = _attention(target, num_rows, context_tokens)
    source, copy = torch.empty(2, COPY_BYTES, dtype=torch.uint8)
    times: dict[str, list[float]] = {}
    config = EngineConfig(drafter="none", max_concurrency=num_rows, share_prefixes=False)
    with BatchEngine(loaded, config) as engine, torch.inference_mode():
        prompt_tokens = context_tokens - num_steps // 2
        _fill(engine, num_rows=num_rows, prompt_tokens=prompt_tokens, num_steps=num_steps, vocab_size=target.vocab_size)
        for _ in range(num_steps):
            before = engine.stats.forward_s, engine.stats.sample_s, engine.stats.host_s
            _note(times, "step", engine.step)
            after = engine.stats.forward_s, engine.stats.sample_s, engine.stats.host_s
            parts = [new - old for old, new in zip(before, after, strict=True)]
            for name, part in zip(("forward", "sample", "host"), parts, strict=True):
                times.setdefault(name, []).append(times["step"][-1] * part / sum(parts))
            _note(times, "products", products)
            _note(times, "onednn", onednn)
            _note(times, "attention", attention)
            _note(times, "copy", lambda: copy.copy_(source))
    ms = {name: median(values) * 1e3 for name, values in times.items()}
    kv = target.kv
    kv_bytes = num_rows * context_tokens * 2 * kv.k[:, :, 0].numel() * kv.k.element_size()
    # A copy reads and writes; its bandwidth counts both.
    kv_copy_ms = ms["copy"] * kv_bytes / (2 * COPY_BYTES)
    floor_ms = min(ms["products"], ms["onednn"]) + kv_copy_ms
    return StepProfile(
        num_rows=num_rows,
        context_tokens=context_tokens,
        step_ms=ms["step"],
        forward_ms=ms["forward"],
        sample_ms=ms["sample"],
        host_ms=ms["host"],
        products_ms=ms["products"],
        attention_ms=ms["attention"],
        onednn_ms=ms["onednn"],
        kv_copy_ms=kv_copy_ms,
        floor_ms=floor_ms,
        floor_share=floor_ms / ms["step"],
        other_share=max(0.0, 1 - (ms["products"] + ms["attention"]) / ms["step"]),
    )


def _note(times: dict[str, list[float]], name: str, work: Callable[[], object]) -> None:
    import torch

    clock = thread_time if torch.get_num_threads() == 1 else perf_counter
    started = clock()
    work()
    times.setdefault(name, []).append(clock() - started)


def _fill(engine: BatchEngine, *, num_rows: int, prompt_tokens: int, num_steps: int, vocab_size: int) -> None:
    """Rows with prompts of their own, all decoding, a few steps on."""
    sampling = SamplingParams(max_new_tokens=2 * num_steps + 64, ignore_eos=True)
    for i in range(num_rows):
        prompt = tuple((7919 * i + 104729 * j) % vocab_size for j in range(prompt_tokens))
        engine.add(Request(id=str(i), prompt_token_ids=prompt, sampling=sampling))
    while engine.stats.num_prefill_tokens < num_rows * prompt_tokens:
        engine.step()
    engine.step()
    assert engine.num_unfinished == num_rows, "a row ended or failed before the steps were timed"


def _products(target: TargetRunner, num_rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """All products of the model alone: the native ones, and oneDNN's over weights of the same shapes."""
    import torch

    from dspark_batch.models.kernels.library import load_kernels
    from dspark_batch.models.kernels.packed import PackedLinear
    from dspark_batch.models.linear import Linear

    spec, dtype = target.spec, target.dtype
    kernels = load_kernels()
    assert kernels is not None, "the profile needs the native kernels"
    hidden, q_width = spec.hidden_size, spec.num_heads * spec.head_dim
    shapes = [
        (q_width + 2 * spec.num_kv_heads * spec.head_dim, hidden),
        (hidden, q_width),
        (2 * spec.intermediate_size, hidden),
        (hidden, spec.intermediate_size),
    ] * spec.num_layers + [(spec.vocab_size, hidden)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs = {width: torch.randn(num_rows, width, dtype=dtype) for _, width in shapes}
    native = [PackedLinear(kernels, weight) for weight in weights]
    onednn = [Linear(weight) for weight in weights]

    def run(products: Sequence[Callable[[torch.Tensor], object]]) -> None:
        for product, (_, width) in zip(products, shapes, strict=True):
            product(inputs[width])

    return lambda: run(native), lambda: run(onednn)


def _attention(target: TargetRunner, num_rows: int, context_tokens: int) -> Callable[[], object]:
    """The attention phase of all layers alone, over rows of this context."""
    import torch

    from dspark_batch.models.kernels.library import AttentionPlan, AttentionShape, attend, load_kernels

    spec, dtype = target.spec, target.dtype
    kernels = load_kernels()
    assert kernels is not None, "the profile needs the native kernels"
    num_tokens = num_rows * context_tokens
    k = torch.randn(spec.num_layers, spec.num_kv_heads, num_tokens, spec.head_dim, dtype=dtype)
    v = k.clone()
    angles = torch.zeros(context_tokens, spec.head_dim // 2)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = torch.randn(num_rows, width, dtype=dtype)
    out = torch.empty(num_rows, spec.num_heads * spec.head_dim, dtype=dtype)
    rows = [(1, context_tokens - 1, i * context_tokens, 0, 0) for i in range(num_rows)]
    shape = AttentionShape(
        num_q_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, cache_tokens=num_tokens
    )

    def run() -> None:
        plan = AttentionPlan(kernels, rows, shape)
        for layer in range(spec.num_layers):
            attend(kernels, plan, qkv, cos=angles, sin=angles, k=k[layer], v=v[layer], out=out)

    return run


def command(
    concurrency: Concurrency = "1,8,32,128",
    context: ContextTokens = 200,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 30,
    target: Target = DEFAULT_TARGET,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Parts of a plain decoding step against its floor."""
    import torch

    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.models.loader import load_target

    rows = parse_concurrencies(concurrency)
    torch.set_num_threads(threads or torch.get_num_threads())
    loaded = load_target(EngineConfig(target=target))
    profiles = profile_steps(loaded, rows=rows, context_tokens=context, num_steps=steps)
    sys.stdout.write(format_profiles(profiles) + "\n")
    if as_json:
        write_json([asdict(profile) for profile in profiles])


if __name__ == "__main__":
    sys.exit(run_module(command))
