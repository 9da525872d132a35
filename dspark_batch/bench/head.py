"""What it saves to make few logits: arg-max and whole plain steps with and without, alternately, in one engine.

``python -m dspark_batch.bench.head [--prompts FILE] [--concurrency 1,8,32,128] [--dtype float32]``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Concurrency,
    Dtype,
    Target,
    Threads,
    engine_config,
    run_module,
    write_json,
)
from dspark_batch.bench.prompts import read_prompts, with_sampling
from dspark_batch.core import Request, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from dspark_batch.models.kernels.argmax import ProductArgmax
    from dspark_batch.models.loader import LoadedTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadProfile:
    """Median milliseconds of the arg-max and of the step around it, where all logits are made and where few are."""

    num_rows: int
    all_ms: float
    few_ms: float
    step_all_ms: float
    step_few_ms: float


class _Timed:
    """An arg-max with a clock, and the times of the steps that called it."""

    def __init__(self, argmax: ProductArgmax) -> None:
        self._argmax = argmax
        self.seconds: list[float] = []
        self.step_seconds: list[float] = []

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        started = perf_counter()
        found = self._argmax(hidden)
        self.seconds.append(perf_counter() - started)
        return found


def profile_head(loaded: LoadedTarget, requests: Sequence[Request], *, num_rows: int, num_steps: int) -> HeadProfile:
    """``num_steps`` plain steps of each kind, once the prompts are done. Needs the native kernels."""
    from dspark_batch.engine.config import EngineConfig
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.models.kernels.argmax import ProductArgmax
    from dspark_batch.models.native import NativeDecoder

    decoder = loaded.target.decoder
    assert isinstance(decoder, NativeDecoder), "the profile needs the native kernels"
    draws, own = decoder.draws, decoder.draws.product_argmax
    assert isinstance(own, ProductArgmax), "the profile is running already"
    few, every = _Timed(own), _Timed(own.of_all_outputs())
    sampling = SamplingParams(max_new_tokens=2 * num_steps + 64, ignore_eos=True)
    config = EngineConfig(drafter="none", schedule="off", max_concurrency=num_rows)
    try:
        with BatchEngine(loaded, config) as engine:
            for request in with_sampling(list(requests), sampling, first=0, count=num_rows):
                engine.add(request)
            while engine.stats.last is None or engine.stats.last.num_prefill_tokens:
                engine.step()
            for number in range(2 * num_steps):
                timed = (few, every)[number % 2]
                draws.product_argmax = timed
                started = perf_counter()
                engine.step()
                timed.step_seconds.append(perf_counter() - started)
            assert engine.num_unfinished == num_rows, "a row ended or failed before the steps were timed"
    finally:
        draws.product_argmax = own
    times = (every.seconds, few.seconds, every.step_seconds, few.step_seconds)
    all_ms, few_ms, step_all_ms, step_few_ms = (median(seconds) * 1e3 for seconds in times)
    return HeadProfile(
        num_rows=num_rows, all_ms=all_ms, few_ms=few_ms, step_all_ms=step_all_ms, step_few_ms=step_few_ms
    )


def format_profiles(profiles: Sequence[HeadProfile]) -> str:
    lines = ["rows | head: all logits     few         | step: all logits     few"]
    lines += [
        f"{p.num_rows:4d} | {p.all_ms:16.2f} {p.few_ms:7.2f} {p.all_ms / p.few_ms:5.2f}x |"
        f" {p.step_all_ms:16.2f} {p.step_few_ms:7.2f} {p.step_all_ms / p.step_few_ms:6.3f}x"
        for p in profiles
    ]
    return "\n".join(lines)


def command(
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; default: built in.")] = None,
    concurrency: Concurrency = "1,8,32,128",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each kind; default: by rows.")] = None,
    target: Target = DEFAULT_TARGET,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Arg-max and plain steps with all logits and with few, alternately."""
    import torch

    from dspark_batch.bench.scheduler import built_in_prompts
    from dspark_batch.models.loader import load_target

    requests = built_in_prompts() if prompts is None else read_prompts(prompts)
    torch.set_num_threads(threads or torch.get_num_threads())
    loaded = load_target(engine_config({"target": target, "dtype": dtype}))
    profiles = []
    for rows in parse_concurrencies(concurrency):
        profiles.append(
            profile_head(loaded, requests, num_rows=rows, num_steps=steps or max(20, min(200, 1200 // rows)))
        )
        sys.stderr.write(f"{rows} rows done\n")
    sys.stdout.write(format_profiles(profiles) + "\n")
    if as_json:
        write_json([asdict(profile) for profile in profiles])


if __name__ == "__main__":
    sys.exit(run_module(command))
