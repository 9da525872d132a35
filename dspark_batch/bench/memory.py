"""Whether a long job's memory grows: resident size and held KV over many short requests through one engine."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_batch.bench.options import AsJson, Rows, run_module, write_json
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig

if TYPE_CHECKING:
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.tensors import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """resident_mib: (requests finished, resident size) at even distances, after the warm-up.

    growth_mib: between the first and the last of them. most_kv_tokens: held at once, of kv_tokens in all.
    """

    num_requests: int
    resident_mib: tuple[tuple[int, float], ...]
    growth_mib: float
    most_kv_tokens: int
    kv_tokens: int


def measure_memory(
    engine: BatchEngine, target: Target, *, num_requests: int, num_samples: int = 10, warm_up_requests: int = 500
) -> MemoryReport:
    """Streams requests of ragged lengths, every tenth sampled three times with penalties, through the engine.

    ``target`` is the engine's own; its KV memory must be free again once the last prefix is dropped.
    """
    kv, vocab_size = target.kv, target.vocab_size
    every = max(1, (num_requests - warm_up_requests) // num_samples)
    resident: list[tuple[int, float]] = []
    most_kv_tokens = num_done = 0
    for result in engine.stream(_request(i, vocab_size) for i in range(num_requests)):
        most_kv_tokens = max(most_kv_tokens, kv.num_total_tokens - kv.num_free_tokens)
        num_done += result.sample == 0
        if result.sample == 0 and num_done >= warm_up_requests and (num_done - warm_up_requests) % every == 0:
            resident.append((num_done, resident_bytes() / 2**20))
    assert kv.num_free_tokens == kv.num_total_tokens, "KV memory is held after the last request"
    return MemoryReport(
        num_requests=num_requests,
        resident_mib=tuple(resident),
        growth_mib=resident[-1][1] - resident[0][1],
        most_kv_tokens=most_kv_tokens,
        kv_tokens=kv.num_total_tokens,
    )


def resident_bytes() -> int:
    """Resident size of this process. Linux only."""
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _request(index: int, vocab_size: int) -> Request:
    prompt = tuple((index * 31 + j * 17) % vocab_size for j in range(3 + index % 23))
    sampling = SamplingParams(max_new_tokens=1 + index % 7, ignore_eos=True)
    if index % 10 == 0:
        sampling = SamplingParams(
            max_new_tokens=5, temperature=0.9, top_p=0.9, repetition_penalty=1.1, logprobs=2, n=3, ignore_eos=True
        )
    return Request(id=str(index), prompt_token_ids=prompt, sampling=sampling)


def command(
    rows: Rows = 10_000,
    drafter: Annotated[str, typer.Option(help="Drafter of the engine.")] = "suffix",
    as_json: AsJson = False,
) -> None:
    """Resident memory over many short requests through one engine, on a tiny random model."""
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.models.loader import load_target
    from dspark_batch.testing.tiny import save_tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_checkpoint(folder, hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96)
        config = EngineConfig.model_validate(
            {"target": str(path), "drafter": drafter, "max_concurrency": 32, "kv_cache_gib": 0.001}
        )
        loaded = load_target(config)
        with BatchEngine(loaded, config) as engine:
            report = measure_memory(engine, loaded.target, num_requests=rows, warm_up_requests=min(500, rows // 4))
    for num_done, mib in report.resident_mib:
        sys.stdout.write(f"{num_done:8d} requests {mib:8.1f} MiB\n")
    kv = f"at most {report.most_kv_tokens} of {report.kv_tokens} KV tokens"
    sys.stdout.write(f"growth {report.growth_mib:.1f} MiB, {kv}\n")
    if as_json:
        write_json(asdict(report))


if __name__ == "__main__":
    sys.exit(run_module(command))
