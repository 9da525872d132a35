"""One timed run of one engine setting over a list of requests, and what it did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dspark_batch.core import Request, Result
from dspark_batch.engine.config import EngineConfig
from dspark_batch.metrics import EngineStats

if TYPE_CHECKING:
    from dspark_batch.models.loader import LoadedTarget
    from dspark_batch.scheduling.policies import LengthPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Counts in tokens, times in seconds. wall_s: from the first request to the last result, prompts included.

    num_wasted_tokens: drafted, and not accepted. accepted_length: None before the first round. tail_s: from the moment
    the queue was empty to the end.
    """

    num_rows: int
    num_prompt_tokens: int
    num_emitted_tokens: int
    num_drafted_tokens: int
    num_verified_draft_tokens: int
    num_accepted_tokens: int
    num_wasted_tokens: int
    num_steps: int
    accepted_length: float | None
    wall_s: float
    draft_s: float
    forward_s: float
    sample_s: float
    host_s: float
    tail_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_emitted_tokens / self.wall_s

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def measure(
    loaded: LoadedTarget, config: EngineConfig, requests: Sequence[Request], *, policy: LengthPolicy | None = None
) -> Measurement:
    """Decode ``requests`` with a fresh engine: a drafter that learns from the job starts empty, as in a new job.

    policy: instead of the one that ``config.schedule`` names.

    Raises:
        ValueError: a request failed, so the figures would not be comparable.
    """
    from dspark_batch.engine.engine import BatchEngine

    with BatchEngine(loaded, config, policy=policy) as engine:
        started = time.perf_counter()
        for request in requests:
            engine.add(request)
        results: list[Result] = []
        queue_empty_at = None
        while engine.num_unfinished:
            results.extend(result for _, result in engine.step())
            if queue_empty_at is None and engine.stats.last is not None and not engine.stats.last.num_queued:
                queue_empty_at = time.perf_counter()
        ended = time.perf_counter()
        stats = engine.stats
    failed = [result for result in results if result.error is not None]
    if failed:
        raise ValueError(f"request {failed[0].id!r} failed: {failed[0].error}")
    return _measurement(
        stats,
        num_rows=len(results),
        num_prompt_tokens=sum(result.num_prompt_tokens for result in results),
        wall_s=ended - started,
        tail_s=ended - (queue_empty_at or ended),
    )


def _measurement(
    stats: EngineStats, *, num_rows: int, num_prompt_tokens: int, wall_s: float, tail_s: float
) -> Measurement:
    return Measurement(
        num_rows=num_rows,
        num_prompt_tokens=num_prompt_tokens,
        num_emitted_tokens=stats.num_emitted_tokens,
        num_drafted_tokens=stats.num_drafted_tokens,
        num_verified_draft_tokens=stats.num_verified_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
        num_wasted_tokens=stats.num_drafted_tokens - stats.num_accepted_tokens,
        num_steps=stats.num_steps,
        accepted_length=stats.accepted_length,
        wall_s=wall_s,
        draft_s=stats.draft_s,
        forward_s=stats.forward_s,
        sample_s=stats.sample_s,
        host_s=stats.host_s,
        tail_s=tail_s,
    )
