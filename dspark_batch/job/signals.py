"""Graceful stop: the first SIGTERM or Ctrl-C asks, the second ends the process at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

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
