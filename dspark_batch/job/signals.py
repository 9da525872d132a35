"""Graceful stop: the first SIGTERM or Ctrl-C asks, the second ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType, TracebackType
from typing import Any, Protocol, Self, TypeVar

from dspark_batch.job.backend import TICK_S

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Installs handlers for the time of a ``with`` block; a no-op off the main thread, where Python allows none."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.take_signals()
        return self

    def take_signals(self) -> None:
        """Install the handlers again where a library has put its own in their place, as Ray does when it starts."""
        for number in self._previous:
            signal.signal(number, self._receive)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def signal_name(self) -> str | None:
        """The signal that asked to stop, or None."""
        return self._name

    def is_asked(self) -> bool:
        return self._name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name


class StoppedEarlyError(Exception):
    """A signal asked to stop before any shard began."""


class Closable(Protocol):
    def close(self) -> None: ...


_Made = TypeVar("_Made", bound=Closable)


def made_unless_stopped(make: Callable[[], _Made], *, stop: StopRequest) -> _Made:
    """What ``make`` gives or raises, unless ``stop`` is asked for meanwhile: StoppedEarlyError.

    It is made on a daemon thread, since loading a model cannot be broken off; what comes out after a stop is closed.
    """
    made: Future[_Made] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=work, name="dspark-batch-load", daemon=True).start()
    while not wait([made], timeout=TICK_S).done:
        if stop.is_asked():
            made.add_done_callback(_close)
            raise StoppedEarlyError
    return made.result()


def _close(made: Future[Any]) -> None:
    if made.exception() is None:
        made.result().close()
