"""Timed runs of engine settings over a list of requests, one alone or several in turns, and what they did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dspark_batch.core import Request, Result
from dspark_batch.engine.config import EngineConfig
from dspark_batch.metrics import EngineStats

if TYPE_CHECKING:
    from dspark_batch.engine.engine import BatchEngine
    from dspark_batch.models.loader import LoadedTarget
    from dspark_batch.scheduling.policies import LengthPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Counts in tokens, times in seconds. wall_s: of adding the requests and of all steps, prompts included.

    num_wasted_tokens: drafted, and not accepted. accepted_length: None before the first round. tail_s: of the steps
    after the queue was empty.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an engine is made with. policy: instead of the one that ``config.schedule`` names."""

    config: EngineConfig
    policy: LengthPolicy | None = None


def measure(loaded: LoadedTarget, setting: Setting, requests: Sequence[Request]) -> Measurement:
    """Decode ``requests`` with a fresh engine: a drafter that learns from the job starts empty, as in a new job.

    Raises:
        ValueError: a request failed, so the figures would not be comparable.
    """
    return measure_in_turns(loaded, [setting], requests)[0]


def measure_in_turns(
    loaded: LoadedTarget, settings: Sequence[Setting], requests: Sequence[Request]
) -> list[Measurement]:
    """Decode ``requests`` with an engine for every setting, all at once: the next step is that of the engine which has
    come least far, and every engine's clock runs in its own steps only.

    So a machine whose speed moves hits all settings alike, down to parts of a second. They share the KV memory.

    Raises:
        ValueError: a request failed, so the figures would not be comparable.
        EngineError: a device failed, or the KV memory has no room for a row of every setting.
    """
    from dspark_batch.engine.engine import BatchEngine

    with ExitStack() as stack:
        runs = [
            _Run(stack.enter_context(BatchEngine(loaded, setting.config, policy=setting.policy)), requests)
            for setting in settings
        ]
        while unfinished := [run for run in runs if run.engine.num_unfinished]:
            min(unfinished, key=lambda run: run.num_tokens).step()
        return [run.measurement() for run in runs]


class _Run:
    """One engine, its results, and the time that it took."""

    def __init__(self, engine: BatchEngine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self._results: list[Result] = []
        self._tail_s = 0.0
        started = time.perf_counter()
        for request in requests:
            engine.add(request)
        self._wall_s = time.perf_counter() - started

    @property
    def num_tokens(self) -> int:
        """Of prompts and outputs, done so far."""
        return self.engine.stats.num_prefill_tokens + self.engine.stats.num_emitted_tokens

    def step(self) -> None:
        last = self.engine.stats.last
        is_tail = last is not None and not last.num_queued
        started = time.perf_counter()
        self._results.extend(result for _, result in self.engine.step())
        took = time.perf_counter() - started
        self._wall_s += took
        self._tail_s += took if is_tail else 0.0

    def measurement(self) -> Measurement:
        failed = [result for result in self._results if result.error is not None]
        if failed:
            raise ValueError(f"request {failed[0].id!r} failed: {failed[0].error}")
        return _measurement(
            self.engine.stats,
            num_rows=len(self._results),
            num_prompt_tokens=sum(result.num_prompt_tokens for result in self._results),
            wall_s=self._wall_s,
            tail_s=self._tail_s,
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
