"""Notices an engine that hangs. Its thread cannot be interrupted, so all that depends on it is told to give up."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from datetime import UTC, datetime

SLOWEST_FACTOR = 10
"""A pause counts as a hang only where it is so many times longer than the longest pause before it."""

LOOKS_PER_TIMEOUT = 20
MAX_INTERVAL_S = 5.0


class Watchdog:
    """Calls ``on_hang`` once, when a busy engine has made no progress for too long.

    That is ``timeout_s``, or ``first_timeout_s`` before the first progress (kernels are compiled, the first prompts are
    long), or ten times the longest pause so far, whichever is most: an engine that is slow throughout is not hung.

    Args:
        progress: a value that changes with every round in which something happened. Called from a thread of its own.
        is_busy: whether the engine has work; while it has none, no time counts.
        on_hang: gets the seconds without progress.
        ends_process: end the process (exit status 1, stacks on stderr) where not even the interpreter makes progress,
            because the engine hangs in native code that holds its lock.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        first_timeout_s: float,
        progress: Callable[[], Hashable],
        is_busy: Callable[[], bool],
        on_hang: Callable[[float], None],
        ends_process: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = timeout_s
        self._first_timeout_s = max(timeout_s, first_timeout_s)
        self._progress = progress
        self._is_busy = is_busy
        self._on_hang = on_hang
        self._ends_process = ends_process
        self._clock = clock
        self._interval_s = min(MAX_INTERVAL_S, timeout_s / LOOKS_PER_TIMEOUT)
        self._initial = self._last = progress()
        self._looked_s = clock()
        self._pause_s = 0.0
        self._longest_s = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dspark-batch-watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Look several times per timeout until ``stop``."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """May be called twice."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def limit_s(self) -> float:
        """How long the engine may be without progress now."""
        if self._last == self._initial:
            return self._first_timeout_s
        return max(self._timeout_s, SLOWEST_FACTOR * self._longest_s)

    def look(self) -> bool:
        """Compare with what was there at the last look; False once the engine hangs.

        Time in which nobody looked, as the whole process was stopped, does not count.
        """
        now_s, progress = self._clock(), self._progress()
        self._pause_s += min(now_s - self._looked_s, 2 * self._interval_s)
        self._looked_s = now_s
        if progress != self._last:
            if self._last != self._initial:
                self._longest_s = max(self._longest_s, self._pause_s)
            self._last = progress
            self._pause_s = 0.0
        elif not self._is_busy():
            self._pause_s = 0.0
        if self._pause_s <= self.limit_s:
            return True
        self._on_hang(self._pause_s)
        return False

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(self._interval_s):
                if not self.look():
                    return
                if self._ends_process and sys.__stderr__ is not None:
                    faulthandler.dump_traceback_later(self.limit_s + MAX_INTERVAL_S, exit=True, file=sys.__stderr__)
        finally:
            if self._ends_process:
                faulthandler.cancel_dump_traceback_later()


def describe_hang(*, pause_s: float, thread: threading.Thread, doing: str) -> str:
    """What hangs, since when and where, for an error message. Writes the stacks of all threads to stderr."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    since = datetime.fromtimestamp(time.time() - pause_s, UTC).isoformat(sep=" ", timespec="seconds")
    frame = sys._current_frames().get(thread.ident or 0)
    where = "an unknown place" if frame is None else _place(traceback.extract_stack(frame)[-1])
    return (
        f"the engine hangs: no progress for {pause_s:.1f} s (since {since}) in {doing}, at {where}; the stacks of all "
        "threads are on stderr of its process; engine.watchdog_s sets the time"
    )


def _place(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno} in {frame.name}"
