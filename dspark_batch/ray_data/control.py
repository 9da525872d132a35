"""The one small actor that the driver and the shard actors talk through: stop, faults, and a bound on restarts."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_batch.batch.live import LiveCounts
from dspark_batch.errors import ConfigError, Problem

WITHOUT_A_WORD = "the process ended without a word (killed, out of memory, or crashed)"
MAX_FRUITLESS_STARTS = 4
"""Starts of an actor in a row, per actor of the pool, between which no shard was committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended the job inside an actor: the exception's class by name, its message, a ConfigError's problems."""

    kind: str
    message: str
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, error: Exception) -> Failure:
        problems = error.problems if isinstance(error, ConfigError) else ()
        return cls(kind=type(error).__name__, message=str(error), problems=problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The failure that ended the job, if any, and what all engines have produced, those that ended included."""

    failure: Failure | None
    live: LiveCounts


class JobControl:
    """State of one run, kept in a Ray actor. It dies with the driver.

    An engine fault ends the actor's process and Ray starts another, without end if need be; this is where it ends:
    after ``MAX_FRUITLESS_STARTS`` starts per actor without a commit in between, the run counts as failed.
    """

    def __init__(self, *, num_actors: int) -> None:
        self._max_starts = MAX_FRUITLESS_STARTS * num_actors
        self._num_starts = 0
        self._last_fault: str | None = None
        self._is_loading = False
        self._failure: Failure | None = None
        self._stopping = False
        self._live: dict[str, LiveCounts] = {}

    def begin_worker(self) -> bool:
        """An actor starts. False: it must not, since the starts before it came to nothing."""
        self._num_starts += 1
        if self._num_starts > self._max_starts and self._failure is None:
            fault = self._last_fault or WITHOUT_A_WORD
            if self._last_fault is None and self._is_loading:
                fault = f"while it loaded the model, {WITHOUT_A_WORD}"
            message = f"the engine broke {self._num_starts - 1} times without finishing a shard; last: {fault}"
            self._failure = Failure(kind="EngineError", message=message)
        self._is_loading = True
        return self._failure is None

    def note_loaded(self) -> None:
        """The actor that started last has its model and takes shards."""
        self._is_loading = False

    def begin_shard(self) -> bool:
        """Whether an actor may begin another shard."""
        return not self._stopping and self._failure is None

    def note_commit(self) -> None:
        self._num_starts = 0

    def note_fault(self, message: str) -> None:
        """The engine of an actor broke; its process ends and is replaced."""
        self._last_fault = message

    def fail(self, failure: Failure) -> None:
        """The job cannot go on. The first failure is kept."""
        if self._failure is None:
            self._failure = failure

    def stop(self) -> None:
        """Begin no further shard."""
        self._stopping = True

    def note_live(self, worker: str, counts: LiveCounts) -> None:
        """What an actor's engine has produced so far; replaces what it told before."""
        self._live[worker] = counts

    def status(self) -> Status:
        """What the driver asks for several times a second."""
        return Status(failure=self._failure, live=sum(self._live.values(), start=LiveCounts()))
