"""What an engine has produced so far, for progress lines and metrics that move while a long shard decodes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dspark_batch.batch.contract import MeasuredEngine, PlacedEngine, RowEngine
from dspark_batch.core import Request, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCounts:
    """Samples that came out of an engine, failed ones included, its steps, and tokens and rounds.

    Where the engine counts them (``MeasuredEngine``), tokens and rounds are those of all samples, of those that still
    decode too; else of those that came out. ``num_verified_tokens``: drafted tokens that the target checked.
    """

    num_samples: int = 0
    num_failed_samples: int = 0
    num_generated_tokens: int = 0
    num_rounds: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_verified_tokens: int = 0

    def __add__(self, other: LiveCounts) -> LiveCounts:
        return LiveCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: LiveCounts) -> LiveCounts:
        return LiveCounts(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Samples that decode now, and those that wait for a place in the batch."""

    num_running: int = 0
    num_queued: int = 0


class CountingEngine:
    """A ``RowEngine`` that counts what comes out of another. The counts may be read from any thread."""

    def __init__(self, engine: RowEngine) -> None:
        self._engine = engine
        self._num_steps = 0
        self._num_samples = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._num_rounds = 0
        self._num_drafted = 0
        self._num_accepted = 0
        self._num_prompt = 0

    @property
    def counts(self) -> LiveCounts:
        counts = LiveCounts(
            num_samples=self._num_samples,
            num_failed_samples=self._num_failed,
            num_generated_tokens=self._num_tokens,
            num_rounds=self._num_rounds,
            num_drafted_tokens=self._num_drafted,
            num_accepted_tokens=self._num_accepted,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prompt,
            num_verified_tokens=self._num_drafted,
        )
        if not isinstance(self._engine, MeasuredEngine):
            return counts
        stats = self._engine.stats
        return replace(
            counts,
            num_generated_tokens=stats.num_emitted_tokens,
            num_rounds=stats.num_row_rounds,
            num_drafted_tokens=stats.num_drafted_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
            num_steps=stats.num_steps,
            num_prefill_tokens=stats.num_prefill_tokens,
            num_verified_tokens=stats.num_verified_draft_tokens,
        )

    @property
    def by_position(self) -> list[tuple[int, int]]:
        """Verified and accepted tokens of each draft position; empty where the engine does not count them."""
        return self._engine.stats.by_position() if isinstance(self._engine, MeasuredEngine) else []

    @property
    def device(self) -> str | None:
        """The kind of device; None of an engine that does not say."""
        return self._engine.device if isinstance(self._engine, PlacedEngine) else None

    @property
    def load(self) -> EngineLoad:
        num_unfinished = self._engine.num_unfinished
        last = self._engine.stats.last if isinstance(self._engine, MeasuredEngine) else None
        num_queued = max(0, num_unfinished - self._engine.max_concurrency)
        if last is not None:
            num_queued = min(max(num_queued, last.num_queued), num_unfinished)
        return EngineLoad(num_running=num_unfinished - num_queued, num_queued=num_queued)

    @property
    def num_processed(self) -> int:
        """Grows with every round in which something happened: tokens computed or generated, samples that came out.

        Of an engine that does not count tokens, every round counts.
        """
        if not isinstance(self._engine, MeasuredEngine):
            return self._num_steps
        stats = self._engine.stats
        return self._num_samples + stats.num_prefill_tokens + stats.num_emitted_tokens

    @property
    def num_unfinished(self) -> int:
        return self._engine.num_unfinished

    @property
    def max_concurrency(self) -> int:
        return self._engine.max_concurrency

    @property
    def has_chat_template(self) -> bool:
        return self._engine.has_chat_template

    def add(self, request: Request) -> int:
        return self._engine.add(request)

    def step(self) -> list[tuple[int, Result]]:
        finished = self._engine.step()
        self._num_steps += 1
        for _, result in finished:
            self._num_samples += 1
            self._num_failed += result.error is not None
            self._num_tokens += result.num_generated_tokens
            self._num_rounds += result.num_rounds
            self._num_drafted += result.num_drafted_tokens
            self._num_accepted += result.num_accepted_tokens
            self._num_prompt += result.num_prompt_tokens
        return finished

    def close(self) -> None:
        self._engine.close()
