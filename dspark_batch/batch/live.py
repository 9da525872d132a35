"""What an engine has produced so far, for progress lines that move while a long shard decodes."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_batch.batch.contract import RowEngine
from dspark_batch.core import Request, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCounts:
    """Samples that came out of an engine, failed ones included, with their tokens and rounds."""

    num_samples: int = 0
    num_generated_tokens: int = 0
    num_rounds: int = 0

    def __add__(self, other: LiveCounts) -> LiveCounts:
        return LiveCounts(
            num_samples=self.num_samples + other.num_samples,
            num_generated_tokens=self.num_generated_tokens + other.num_generated_tokens,
            num_rounds=self.num_rounds + other.num_rounds,
        )


class CountingEngine:
    """A ``RowEngine`` that counts what comes out of another. ``counts`` may be read from any thread."""

    def __init__(self, engine: RowEngine) -> None:
        self._engine = engine
        self._counts = LiveCounts()

    @property
    def counts(self) -> LiveCounts:
        return self._counts

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
        if finished:
            results = [result for _, result in finished]
            self._counts += LiveCounts(
                num_samples=len(results),
                num_generated_tokens=sum(result.num_generated_tokens for result in results),
                num_rounds=sum(result.num_rounds for result in results),
            )
        return finished

    def close(self) -> None:
        self._engine.close()
