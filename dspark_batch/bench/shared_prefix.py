"""Throughput of a job whose prompts share a long prefix, with sharing on and off, and whether outputs are equal."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    MaxNewTokens,
    Repeats,
    Rows,
    Target,
    run_module,
    write_json,
)
from dspark_batch.core import Request, Result, SamplingParams
from dspark_batch.engine.config import EngineConfig

if TYPE_CHECKING:
    from dspark_batch.engine.engine import ServedTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixReport:
    """Medians over the repeats. speedup: of the medians, sharing on against off."""

    num_rows: int
    prefix_tokens: int
    own_tokens: int
    new_tokens: int
    shared_tokens_per_s: float
    unshared_tokens_per_s: float
    speedup: float
    num_shared_prefix_tokens: int
    outputs_equal: bool


def prefix_requests(
    *, num_rows: int, prefix_tokens: int, own_tokens: int, new_tokens: int, vocab_size: int, seed: int = 0
) -> list[Request]:
    """Requests of random token ids whose first ``prefix_tokens`` are the same."""
    draw = random.Random(seed)
    prefix = tuple(draw.randrange(vocab_size) for _ in range(prefix_tokens))
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [
        Request(
            id=str(i),
            prompt_token_ids=(*prefix, *(draw.randrange(vocab_size) for _ in range(own_tokens))),
            sampling=sampling,
        )
        for i in range(num_rows)
    ]


def measure_shared_prefix(
    loaded: ServedTarget, config: EngineConfig, requests: Sequence[Request], *, prefix_tokens: int, repeats: int = 1
) -> SharedPrefixReport:
    """Runs the requests with sharing on and off in turn, on one loaded target."""
    from dspark_batch.engine.engine import BatchEngine

    seconds: dict[bool, list[float]] = {True: [], False: []}
    results: dict[bool, list[Result]] = {}
    num_shared = 0
    for _ in range(repeats):
        for shares in (True, False):
            with BatchEngine(loaded, config.model_copy(update={"share_prefixes": shares})) as engine:
                started = perf_counter()
                results[shares] = list(engine.generate(requests))
                seconds[shares].append(perf_counter() - started)
                num_shared = max(num_shared, engine.stats.num_shared_prefix_tokens)
    num_new = sum(result.num_generated_tokens for result in results[True])
    shared, unshared = (num_new / median(seconds[shares]) for shares in (True, False))
    first = requests[0]
    assert first.prompt_token_ids is not None, "the requests hold token ids"
    return SharedPrefixReport(
        num_rows=len(requests),
        prefix_tokens=prefix_tokens,
        own_tokens=len(first.prompt_token_ids) - prefix_tokens,
        new_tokens=first.sampling.max_new_tokens,
        shared_tokens_per_s=shared,
        unshared_tokens_per_s=unshared,
        speedup=shared / unshared,
        num_shared_prefix_tokens=num_shared,
        outputs_equal=[r.token_ids for r in results[True]] == [r.token_ids for r in results[False]],
    )


def command(
    rows: Rows = 64,
    prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens that all prompts begin with.")] = 1000,
    own_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt behind them.")] = 40,
    max_new_tokens: MaxNewTokens = 64,
    repeats: Repeats = 1,
    target: Target = DEFAULT_TARGET,
    as_json: AsJson = False,
) -> None:
    """Throughput of prompts that share a prefix, with sharing on and off in turns."""
    from dspark_batch.models.loader import load_target

    config = EngineConfig(target=target, drafter="none", max_concurrency=rows)
    loaded = load_target(config)
    requests = prefix_requests(
        num_rows=rows,
        prefix_tokens=prefix_tokens,
        own_tokens=own_tokens,
        new_tokens=max_new_tokens,
        vocab_size=loaded.target.vocab_size,
    )
    report = measure_shared_prefix(loaded, config, requests, prefix_tokens=prefix_tokens, repeats=repeats)
    sys.stdout.write(
        f"shared {report.shared_tokens_per_s:.0f} tokens/s, not shared {report.unshared_tokens_per_s:.0f}: "
        f"{report.speedup:.2f}x; outputs equal: {report.outputs_equal}\n"
    )
    if as_json:
        write_json(asdict(report))


if __name__ == "__main__":
    sys.exit(run_module(command))
