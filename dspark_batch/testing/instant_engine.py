"""An engine that answers at once, so that what remains is the work of everything around an engine."""

from __future__ import annotations

from collections import deque

from dspark_batch.core import FinishReason, Request, Result
from dspark_batch.engine.config import EngineConfig

FACTORY = "dspark_batch.testing.instant_engine:instant"


class InstantEngine:
    """A ``RowEngine`` that finishes every row in the step after it was added."""

    has_chat_template = False
    max_concurrency = 256

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Request]] = deque()
        self._num_requests = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> int:
        self._num_requests += 1
        self._waiting.append((self._num_requests, request))
        return self._num_requests

    def step(self) -> list[tuple[int, Result]]:
        done = [(ticket, _result(request)) for ticket, request in self._waiting]
        self._waiting.clear()
        return done

    def close(self) -> None:
        return


def instant(config: EngineConfig) -> InstantEngine:
    """The factory; ``FACTORY`` is its name."""
    return InstantEngine()


def _result(request: Request) -> Result:
    return Result(
        id=request.id,
        text="a short answer",
        token_ids=(1, 2, 3),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=20,
        num_generated_tokens=3,
        num_rounds=2,
        num_drafted_tokens=2,
        num_accepted_tokens=1,
    )
