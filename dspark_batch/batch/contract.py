"""What the batch worker needs of an engine. ``BatchEngine`` fulfils it; tests use a scripted one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dspark_batch.core import Request, Result, RowError
from dspark_batch.metrics import EngineStats


class RowEngine(Protocol):
    """A continuous-batching engine, driven by its caller's thread. Not thread-safe."""

    @property
    def num_unfinished(self) -> int:
        """Samples that were added and have not come out of ``step`` yet."""
        ...

    @property
    def max_concurrency(self) -> int:
        """Samples decoded together; a caller that keeps about twice as many queued never starves it."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    def add(self, request: Request) -> int:
        """Queue all ``sampling.n`` samples of a request; gives a ticket. A bad request comes back as an error result
        from ``step``; only an engine fault raises."""
        ...

    def step(self) -> list[tuple[int, Result]]:
        """Run one round; (ticket, result) of every sample that finished. Raises EngineError when the engine broke."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class ShowingEngine(Protocol):
    """An engine that can show a prompt as its model gets it."""

    def show_prompt(self, request: Request) -> tuple[str, int] | RowError:
        """The text with chat template and special tokens, and its number of tokens; or why the row would fail."""
        ...


@runtime_checkable
class MeasuredEngine(Protocol):
    """An engine that also counts the tokens of samples which have not come out yet."""

    @property
    def stats(self) -> EngineStats: ...


@runtime_checkable
class PlacedEngine(Protocol):
    """An engine that knows the kind of device it computes on: ``cpu`` or ``cuda``."""

    @property
    def device(self) -> str: ...


@runtime_checkable
class WeighedEngine(Protocol):
    """An engine that knows the fingerprint of its target's files (``models.sources.weights_fingerprint``)."""

    @property
    def target_fingerprint(self) -> str: ...
