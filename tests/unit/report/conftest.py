from __future__ import annotations

from collections.abc import Callable

import pytest

from dspark_batch.batch.live import LiveCounts
from dspark_batch.batch.work import EngineWork

MakeEngine = Callable[..., EngineWork]
START_S = 1_780_000_000.0


@pytest.fixture
def make_engine() -> MakeEngine:
    """An engine that loads and then generates evenly: 2 tokens of a draft of 3 hold in each round of 4 samples."""

    def make(
        begin_s: float, *, load_s: float = 10.0, work_s: float = 100.0, num_steps: int = 1000, run_id: str = "r1"
    ) -> EngineWork:
        rounds = 4 * num_steps
        total = LiveCounts(
            num_samples=num_steps // 10,
            num_generated_tokens=3 * rounds,
            num_rounds=rounds,
            num_drafted_tokens=3 * rounds,
            num_accepted_tokens=2 * rounds,
            num_steps=num_steps,
            num_prefill_tokens=num_steps,
            num_verified_tokens=3 * rounds,
        )
        begin_s += START_S
        loaded_s = begin_s + load_s
        return EngineWork(
            run_id=run_id,
            host="host",
            pid=7,
            device="cuda",
            hardware="NVIDIA H200",
            marks=((begin_s, LiveCounts()), (loaded_s, LiveCounts()), (loaded_s + work_s, total)),
            by_position=((rounds, rounds), (rounds, rounds), (rounds, 0)),
        )

    return make
