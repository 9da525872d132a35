"""A store that dies at a chosen step, as a process killed there would, or fails there, as a sick disk would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dspark_batch.batch.store import Store


class SimulatedCrashError(BaseException):
    """Not an ``Exception``: nothing may catch it and go on, as nothing can after SIGKILL."""


class FaultyStore(Store):
    """Counts the changes made to the store; ``fail_at`` (from 1) is the change at which it fails.

    With ``partial`` a failing write leaves half of its bytes behind. ``error`` None simulates the end of the process;
    an exception is raised ``num_failures`` times.
    """

    def __init__(
        self,
        path: str,
        *,
        fail_at: int | None = None,
        error: Exception | None = None,
        num_failures: int = 1,
        partial: bool = True,
    ) -> None:
        super().__init__(path, backoff_s=0.0)
        self.num_changes = 0
        self._fail_at = fail_at
        self._error = error
        self._failures_left = num_failures
        self._partial = partial

    def _write(self, name: str, data: bytes) -> None:
        with self._change():
            if self._partial and self._fails_now:
                super()._write(name, data[: len(data) // 2])
            self._maybe_fail()
            super()._write(name, data)

    def _move(self, source: str, target: str) -> None:
        with self._change():
            self._maybe_fail()
            super()._move(source, target)

    def _delete(self, name: str) -> None:
        with self._change():
            self._maybe_fail()
            super()._delete(name)

    @contextmanager
    def _change(self) -> Iterator[None]:
        self.num_changes += 1
        yield

    @property
    def _fails_now(self) -> bool:
        return self._fail_at is not None and self.num_changes >= self._fail_at and self._failures_left > 0

    def _maybe_fail(self) -> None:
        if not self._fails_now:
            return
        if self._error is None:
            raise SimulatedCrashError(f"killed at change {self.num_changes}")
        self._failures_left -= 1
        raise self._error
