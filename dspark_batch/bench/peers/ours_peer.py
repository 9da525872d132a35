"""Our engine behind the same protocol as the peers, so that all are measured alike."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    from dspark_batch import __version__
    from dspark_batch.engine.engine import BatchEngine

    config = EngineConfig(
        target=setup["model"],
        dtype=setup["dtype"],
        threads=setup["threads"],
        max_concurrency=128,
        kv_cache_gib=3.0,
        **setup.get("engine", {}),
    )
    with BatchEngine.from_config(config) as engine:
        _answer({"ready": True, "version": __version__})
        for line in sys.stdin:
            _answer(_run(engine, json.loads(line)))


def _run(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    sampling = SamplingParams(
        max_new_tokens=job["max_new_tokens"], stop_token_ids=tuple(job["eos_token_ids"]), ignore_eos=True
    )
    requests = [
        Request(id=str(i), prompt_token_ids=tuple(ids), sampling=sampling) for i, ids in enumerate(job["prompts"])
    ]
    started = time.perf_counter()
    results = list(engine.generate(requests))
    seconds = time.perf_counter() - started
    outputs = [list(result.token_ids) for result in results]
    rounds = sum(result.num_rounds for result in results)
    tokens = sum(map(len, outputs))
    return {
        "seconds": seconds,
        "num_tokens": tokens,
        "outputs": outputs,
        "accepted_length": tokens / max(rounds, 1),
    }


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
